"""The folder of an asking: a manifest, and a line an answer as it comes, with what was spent and may still be."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from kdlora.asking.asksettings import AskSettings
from kdlora.errors import ArtifactError, ConfigError, DataError
from kdlora.foreign import read_json
from kdlora.system.integrity import compare, is_sealed_or_old, seal
from kdlora.system.storage import atomic_file, write_json_atomic

_FIRST_REFUSED, _FIRST_UNANSWERED = 3, 20
MANIFEST, ANSWERS = "ask.json", "answers.jsonl"
REFUSED, UNREAD = "the server refuses it", "no answer of the protocol"
"""Begin the reason of a row whose request failed: the next call asks again."""
CUT = "cut at answer_tokens "
"""Begins the reason of a row whose votes were cut, before their limit and a colon; asked again with a higher one."""
_SPLITS = {"data": b'"split":"train"', "audit": b'"split":"validation"', "unlabelled": b'"split":"unlabelled"'}
"""How a line of the log shows which file its row is of."""
_MEANING = {
    "prompts": "a prompt",
    "labels": "the labels, their order or descriptions",
    "examples": "the examples that the prompts show",
    "model": "the model",
    "data": "the data, or what is read of it",
    "method": "how answers are read (votes, temperature, top_logprobs, protocol, codes)",
    "selection": "how rows are chosen (select, select_by, seed; of diverse ones rows)",
}


class BudgetSpentError(Exception):
    """The next request could pass a limit."""


class Key(NamedTuple):
    """Which question was asked of which row: number of the prompt, split, place of the row in it."""

    prompt: int
    split: str
    place: int


class _Line(BaseModel):
    """What happened: an answer to a row, or why it has none; what a request spent (requests, tokens read, written)."""

    model_config = ConfigDict(strict=True)
    prompt: int = 0
    split: str = ""
    id: str | None = None
    probabilities: list[float] | None = None
    unanswered: str = ""
    spent: tuple[int, int, int] = (0, 0, 0)


def begin_folder(folder: Path, ingredients: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Begin a folder, or go on with one of the same making; one that has no answer yet begins anew."""
    manifest = folder / MANIFEST
    if manifest.is_file():
        content = read_json(manifest)
        if not is_sealed_or_old(content) or not isinstance(content.get("ingredients"), dict):
            raise ArtifactError(
                f"{manifest} is damaged or was edited; delete {folder} to ask anew, or name another folder"
            )
        before, (files, text, _, *more) = content["ingredients"], ingredients["data"]
        asked = _asked_files(folder / ANSWERS)
        # Neither a file of no row asked about nor the label column's name, without other labels, changes the answers.
        kept = {name: files.get(name) if name in asked else old for name, old in before["data"][0].items()}
        changed = compare(before, {**ingredients, "data": [kept, text, before["data"][2], *more]})
        if asked and changed:
            named = ", ".join(_MEANING.get(name, name) for name in changed)
            raise ArtifactError(
                f"{folder}: these answers are stale: {named} changed. Name another folder with --to, or delete this "
                "one to ask anew"
            )
    write_json_atomic(manifest, seal({"schema_version": 1, "ingredients": ingredients, **about}))


def _asked_files(log: Path) -> set[str]:
    """Name the files that the rows of a log are of; one without any answer keeps what was spent, and no row."""
    if not log.exists():
        return set()
    with log.open("rb") as lines:
        if any(b'"probabilities":' in line for line in lines):
            lines.seek(0)
            return {name for line in lines for name, split in _SPLITS.items() if split in line}
        lines.seek(0)
        spent = [line for line in lines if b'"id":' not in line]
    with atomic_file(log) as temporary:
        temporary.write_bytes(b"".join(spent))
    return set()


class Answers:
    """The answers, on disk as they come and in a table a prompt and split; and the budget.

    What a request may cost at most is written before it is sent and corrected when the answer is there: what a kill
    interrupts stays counted.
    """

    def __init__(self, folder: Path, ids: Mapping[str, pa.ChunkedArray], labels: int, settings: AskSettings) -> None:
        self.path = folder / ANSWERS
        self._ids, self._labels, self._settings = ids, labels, settings
        self._tables: dict[tuple[int, str], tuple[np.ndarray, np.ndarray]] = {}
        self.spent = np.zeros(3, np.int64)  # requests, tokens read, tokens written
        self._beyond = np.zeros(2, np.int64)  # tokens of an answer above those asked for, at most
        self.done = self.good = self._under_way = 0
        self.bad: dict[Key, dict[str, str]] = {}
        self._synchronised = 0.0
        self._changed = asyncio.Event()

    def __enter__(self) -> Self:
        """Read what is there; a line that a kill cut short goes."""
        self.path.touch()
        whole, places, most = 0, dict[str, dict[str, int]](), self._settings.answer_tokens
        with self.path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                whole += len(text)
                line = self._read(text)
                limit = re.match(CUT + r"(\d{1,9}):", line.unanswered)
                if line.unanswered.startswith((REFUSED, UNREAD)) or (limit and int(limit[1]) < most):
                    continue
                if not places:
                    names = {split: ids.to_pylist() for split, ids in self._ids.items()}
                    places = {split: dict(zip(ids, range(len(ids)), strict=True)) for split, ids in names.items()}
                self._count(line, places.get(line.split, {}).get(line.id or ""))
        self._file = self.path.open("ab", buffering=0)  # last, since a fault above leaves it closed
        self._file.truncate(whole)
        self.resumed = self.done
        return self

    def __exit__(self, *fault: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def _read(self, text: bytes) -> _Line:
        try:
            line = _Line.model_validate_json(text)
            found = line.probabilities
            if found is not None and (len(found) != self._labels or min(found) < 0 or not 0.99 < sum(found) < 1.01):
                raise ValueError
        except (ValidationError, ValueError):
            raise ArtifactError(
                f"{self.path} has a damaged line ({text[:40]!r}...); delete that line, and its row is asked again"
            ) from None
        return line

    def _count(self, line: _Line, place: int | None) -> None:
        self.spent += line.spent
        if line.id is None or place is None:
            return
        values, asked = self._table(line.prompt, line.split)
        self.done += not asked[place]
        asked[place] = True
        self.bad.pop(key := Key(line.prompt, line.split, place), None)
        if line.probabilities is not None:
            self.good += 1
            values[place] = line.probabilities
        else:
            self.bad[key] = {"split": line.split, "id": line.id, "unanswered": line.unanswered}

    def _table(self, prompt: int, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Give the probabilities (rows, labels) and which rows were asked about."""
        if (prompt, split) not in self._tables:
            rows = len(self._ids[split])
            self._tables[prompt, split] = np.full((rows, self._labels), np.nan, np.float32), np.zeros(rows, bool)
        return self._tables[prompt, split]

    def probabilities(self, prompt: int, split: str, places: np.ndarray) -> np.ndarray:
        return self._table(prompt, split)[0][places].astype(np.float64)

    def pending(self, prompt: int, split: str, places: np.ndarray) -> np.ndarray:
        return places[~self._table(prompt, split)[1][places]]

    def refuse_useless(self) -> None:
        """Refuse to go on where the first rows have no answer."""
        reasons = [entry["unanswered"] for entry in self.bad.values()]
        refused = [reason for reason in reasons if reason.startswith(REFUSED)]
        if len(refused) >= _FIRST_REFUSED and len(refused) == len(reasons):
            raise ConfigError(f"{refused[0]}, and so for the first {len(refused)} rows; check the model and the prompt")
        if len(reasons) >= _FIRST_REFUSED and all(reason.startswith(CUT) for reason in reasons):
            raise DataError(
                f"the first {len(reasons)} rows have no answer ({reasons[0]}); raise --answer-tokens (a model that "
                "thinks needs 1000 or more), or change the prompt"
            )
        if len(reasons) >= _FIRST_UNANSWERED:
            raise DataError(
                f"none of the first {len(reasons)} rows has an answer ({reasons[0]}); change the prompt. A model that "
                "thinks before it answers needs --votes 5 and tokens for its thoughts: --answer-tokens 1000"
            )

    def keep(self, key: Key, found: np.ndarray | str) -> None:
        """Keep the probabilities of a row, or why there are none."""
        said: dict[str, Any] = (
            {"unanswered": found} if isinstance(found, str) else {"probabilities": found.round(7).tolist()}
        )
        row = self._ids[key.split][key.place].as_py()
        self._append(_Line(prompt=key.prompt, split=key.split, id=row, **said), key.place)

    def _append(self, line: _Line, place: int | None = None) -> None:
        """Write a line, in one piece: a killed process leaves it whole or cut, never mixed with another."""
        text = line.model_dump_json(exclude_unset=True).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(text) != len(text):
            self._file.truncate(end)  # others write on, until they hear of it
            raise OSError(errno.ENOSPC, "no space left for an answer", str(self.path))
        self._count(line, place)
        if (now := time.monotonic()) > self._synchronised + 1.0:
            os.fsync(self._file.fileno())
            self._synchronised = now

    async def reserve(self, tokens: tuple[int, int]) -> tuple[int, int]:
        """Wait until a request surely fits the budget, whatever those under way cost; give the tokens it is counted by.

        These are its own, and as many more as an answer had at most.
        """
        settings = self._settings
        limits = [one or math.inf for one in (settings.max_requests, settings.max_tokens, settings.max_cost)]
        while True:
            reserved = tuple((self._beyond + tokens).tolist())
            requests, read, written = (self.spent + np.array((1, *reserved))).tolist()
            spent = requests, read + written, settings.cost(read, written) or 0
            if all(one <= limit for one, limit in zip(spent, limits, strict=True)):
                break
            if not self._under_way:
                raise BudgetSpentError
            self._changed.clear()
            await self._changed.wait()
        self._under_way += 1
        self._append(_Line(spent=(1, *reserved)))
        return reserved

    def settle(self, tokens: tuple[int, int], reserved: tuple[int, int], used: tuple[int, int]) -> None:
        self._under_way -= 1
        self._changed.set()
        self._beyond = np.maximum(self._beyond, np.subtract(used, tokens))
        if used != reserved:
            self._append(_Line(spent=(0, used[0] - reserved[0], used[1] - reserved[1])))
