"""The folder of an asking: a manifest, and a line an answer as it comes, with what was spent and may still be."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import re
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from kdlora.asking.asksettings import AskSettings
from kdlora.errors import ArtifactError, DataError
from kdlora.foreign import read_json
from kdlora.system.integrity import compare, is_sealed_or_old, seal
from kdlora.system.storage import write_json_atomic, write_text_atomic

_FIRST_UNANSWERED = 20
MANIFEST, ANSWERS = "ask.json", "answers.jsonl"
REFUSED, UNREAD = "the server refuses it", "no answer of the protocol"
"""Begin the reason of a row whose request failed: the next call asks again."""
CUT = "cut at answer_tokens "
"""Begins the reason of a row whose votes were cut, before their limit and a colon; asked again with a higher one."""
_FILES = {"train": "data", "validation": "audit", "unlabelled": "unlabelled"}
"""Which file the rows of a split are of."""
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
    """Which question was asked of which row: number of the prompt, split, id of the row."""

    prompt: int
    split: str
    id: str


class _Line(BaseModel):
    """What happened: an answer to a row, or why it has none; what a request spent (requests, tokens read, written)."""

    model_config = ConfigDict(strict=True)
    prompt: int = 0
    split: str = ""
    id: str | None = None
    probabilities: list[float] | None = None
    unanswered: str = ""
    spent: tuple[int, int, int] = (0, 0, 0)


class Answers:
    """The answers, on disk as they come; and the budget.

    What a request may cost at most is written before it is sent and corrected when the answer is there: what a kill
    interrupts stays counted.
    """

    def __init__(self, folder: Path, labels: int, settings: AskSettings) -> None:
        """Read what is there, but for a line that a kill cut short."""
        self.path = folder / ANSWERS
        self._labels, self._settings = labels, settings
        self.found: dict[Key, np.ndarray | str] = {}
        """The probabilities of the labels, or why there are none."""
        self.spent = np.zeros(3, np.int64)  # requests, tokens read, tokens written
        self._beyond = np.zeros(2, np.int64)  # tokens of an answer above those asked for, at most
        self.good = self._under_way = self._size = 0
        self._held = np.zeros(3, int)  # for all requests of the rows that are begun
        self._synchronised = 0.0
        self._changed = asyncio.Event()
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            for text in file:
                if not text.endswith(b"\n"):
                    break
                self._size += len(text)
                line = self._read(text)
                limit = re.match(CUT + r"(\d{1,9}):", line.unanswered)
                is_low = limit is not None and int(limit[1]) < settings.answer_tokens
                if not line.unanswered.startswith((REFUSED, UNREAD)) and not is_low:
                    self._count(line)

    def begin(self, ingredients: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Begin the folder, or go on with one of the same making; one that has no answer yet begins anew."""
        manifest = self.path.with_name(MANIFEST)
        if self.good:
            content = read_json(manifest)
            if not is_sealed_or_old(content) or not isinstance(content.get("ingredients"), dict):
                raise ArtifactError(
                    f"{manifest} is damaged or was edited; delete its folder to ask anew, or name another folder"
                )
            before, (files, texts, _, *more) = content["ingredients"], ingredients["data"]
            asked = {_FILES.get(key.split) for key in self.found}
            # Neither a file of no row asked about nor the name of the label column alone changes an answer.
            kept = {name: files.get(name) if name in asked else old for name, old in before["data"][0].items()}
            if changed := compare(before, {**ingredients, "data": [kept, texts, before["data"][2], *more]}):
                named = ", ".join(_MEANING[name] for name in changed)
                raise ArtifactError(
                    f"{manifest.parent}: these answers are stale: {named} changed. Name another folder with --to, or "
                    "delete this one to ask anew"
                )
        write_json_atomic(manifest, seal({"schema_version": 1, "ingredients": ingredients, **about}))
        if self._size and not self.good:  # what was spent stays counted
            self.found.clear()
            requests, read, written = self.spent.tolist()
            text = _Line(spent=(requests, read, written)).model_dump_json(exclude_unset=True) + "\n"
            write_text_atomic(self.path, text)
            self._size = len(text)
        self.resumed = self.done

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        self._file.truncate(self._size)
        return self

    def __exit__(self, *fault: object) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    @property
    def done(self) -> int:
        return len(self.found)

    def _read(self, text: bytes) -> _Line:
        try:
            line = _Line.model_validate_json(text)
            found = line.probabilities
            if found is not None and (min(found, default=0) < 0 or not 0.99 < sum(found) < 1.01):
                raise ValueError
        except ValueError:  # pydantic's is one
            raise ArtifactError(
                f"{self.path} has a damaged line ({text[:40]!r}...); delete that line, and its row is asked again"
            ) from None
        return line

    def _count(self, line: _Line) -> None:
        self.spent += line.spent
        if line.id is None:
            return
        values, key = line.probabilities, Key(line.prompt, line.split, line.id)
        self.good += values is not None
        self.found[key] = line.unanswered if values is None else np.array(values, np.float32)

    def unanswered(self) -> list[tuple[Key, str]]:
        return [(key, found) for key, found in self.found.items() if isinstance(found, str)]

    def probabilities(self, prompt: int, split: str, ids: Iterable[str]) -> np.ndarray:
        """Give the probabilities (rows, labels); those of a row without an answer are NaN."""
        nothing = np.full(self._labels, np.nan, np.float32)
        found = (self.found.get(Key(prompt, split, one), "") for one in ids)
        rows = [nothing if isinstance(one, str) else one for one in found]
        return np.array(rows, np.float64).reshape(-1, self._labels)

    def refuse_useless(self) -> None:
        if not self.good and self.done >= _FIRST_UNANSWERED:
            raise DataError(
                f"none of the first {self.done} rows has an answer ({self.unanswered()[0][1]}); check the model, and "
                "change the prompt. A model that thinks before it answers needs --votes 5 and tokens for its thoughts: "
                "--answer-tokens 1000"
            )

    def keep(self, key: Key, found: np.ndarray | str) -> None:
        said: dict[str, Any] = (
            {"unanswered": found} if isinstance(found, str) else {"probabilities": found.round(7).tolist()}
        )
        self._append(_Line(**key._asdict(), **said))

    def _append(self, line: _Line) -> None:
        """Write a line, in one piece: a killed process leaves it whole or cut, never mixed with another."""
        text = line.model_dump_json(exclude_unset=True).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        if self._file.write(text) != len(text):
            self._file.truncate(end)  # others write on, until they hear of it
            raise OSError(errno.ENOSPC, "no space left for an answer", str(self.path))
        self._count(line)
        if (now := time.monotonic()) > self._synchronised + 1.0:
            os.fsync(self._file.fileno())
            self._synchronised = now

    @contextlib.asynccontextmanager
    async def hold(self, requests: int, tokens: tuple[int, int]) -> AsyncIterator[None]:
        """Begin a row where the budget has room for all of its requests: one that is not ended is paid for nothing."""
        held = await self._room(requests, tokens, is_row=True)
        self._held = self._held + held
        try:
            yield
        finally:
            self._held = self._held - held
            self._changed.set()

    async def reserve(self, tokens: tuple[int, int]) -> tuple[int, int]:
        """Wait until a request surely fits the budget, whatever those under way cost; give the tokens it is counted by.

        These are its own, and as many more as an answer had at most.
        """
        _, read, written = (await self._room(1, tokens, is_row=False)).tolist()
        self._under_way += 1
        self._append(_Line(spent=(1, read, written)))
        return read, written

    async def _room(self, requests: int, tokens: tuple[int, int], *, is_row: bool) -> np.ndarray:
        """Wait until requests, or all of a row beside those of the rows that are begun, fit the budget."""
        while True:
            wanted = requests * np.array((1, *(self._beyond + tokens)))
            if self._fits(self.spent + wanted + (self._held if is_row else 0)):
                return wanted
            if not (self._held.any() if is_row else self._under_way):
                raise BudgetSpentError
            self._changed.clear()
            await self._changed.wait()

    def _fits(self, spent: np.ndarray) -> bool:
        settings = self._settings
        limits = [one or math.inf for one in (settings.max_requests, settings.max_tokens, settings.max_cost)]
        requests, read, written = spent.tolist()
        cost = settings.cost(read, written) or 0
        return all(one <= limit for one, limit in zip((requests, read + written, cost), limits, strict=True))

    def settle(self, tokens: tuple[int, int], reserved: tuple[int, int], used: tuple[int, int]) -> None:
        self._under_way -= 1
        self._changed.set()
        self._beyond = np.maximum(self._beyond, np.subtract(used, tokens))
        if used != reserved:
            self._append(_Line(spent=(0, used[0] - reserved[0], used[1] - reserved[1])))
