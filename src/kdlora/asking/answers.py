"""The folder of an asking: a manifest, a line an answer as it comes, a ledger that a kill cannot lose, the tables."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
from datasets import Dataset

from kdlora.asking.asked_rows import AskedRows
from kdlora.asking.asksettings import AskSettings
from kdlora.data.logit_table import LOGIT, write_table
from kdlora.data.spool import read_column
from kdlora.errors import ArtifactError, DataError
from kdlora.foreign import read_json
from kdlora.system.integrity import compare, hash_json, is_sealed_or_old, seal
from kdlora.system.storage import write_json_atomic

MANIFEST, ANSWERS, TABLE = "ask.json", "answers.jsonl", "probabilities.parquet"
_RESERVED = ("id", "split", "label", "group", "text", "text_pair", "__index_level_0__")
_MEANING = {
    "prompts": "a prompt",
    "labels": "the labels, their order or descriptions",
    "examples": "the examples that the prompts show",
    "model": "the model",
    "data": "the data, or what is read of it",
    "method": "how answers are read (votes, temperature, top_logprobs, protocol)",
    "selection": "how rows are chosen (select, select_by, seed)",
}


class BudgetSpentError(Exception):
    """The next request could pass a limit."""


class Key(NamedTuple):
    """Which question was asked of which row; `prompt` is the number of the prompt."""

    prompt: int
    split: str
    id: str


def begin_folder(folder: Path, ingredients: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Begin a folder, or go on with one of the same making."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        if any(not entry.name.startswith(".") for entry in folder.glob("*")):
            raise ArtifactError(
                f"{folder} is not empty and holds no answers of a language model; name another with --to"
            )
        write_json_atomic(
            manifest,
            seal({"schema_version": 1, "fingerprint": hash_json(ingredients), "ingredients": ingredients, **about}),
        )
        return
    content = read_json(manifest)
    if not is_sealed_or_old(content) or not isinstance(content.get("ingredients"), dict):
        raise ArtifactError(f"{manifest} is damaged or was edited; delete {folder} to ask anew, or name another folder")
    if changed := compare(content["ingredients"], ingredients):
        named = ", ".join(_MEANING.get(name, name) for name in changed)
        raise ArtifactError(
            f"{folder}: these answers are stale: {named} changed. Name another folder with --to, or delete this one to "
            "ask anew"
        )


class AnswerLog:
    """The answers on disk: lines are appended as answers come, and synchronised now and then.

    A line may hold an answer, and what it adds to the requests and tokens spent. What a request may cost at most is
    added before it is sent and corrected when the answer is there: what a kill interrupts stays counted.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ANSWERS
        self.spent = np.zeros(3, np.int64)  # requests, tokens read, tokens written
        self.done: set[Key] = set()
        self.good = 0
        self.bad: list[dict[str, str]] = []

    def __enter__(self) -> Self:
        """Read what is there; a line that a kill cut short goes."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._unsynchronised = False
        whole = 0
        for line in self._lines():
            whole += len(line)
            self._count(self._read(line))
        os.ftruncate(self._file, whole)
        self.resumed = len(self.done)
        return self

    def __exit__(self, *fault: object) -> None:
        """Synchronise, and close."""
        self.synchronise()
        os.close(self._file)

    def _lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))

    def _read(self, line: bytes) -> dict[str, Any]:
        try:
            content: dict[str, Any] = json.loads(line)
            content.get("id")
        except (ValueError, AttributeError, RecursionError):
            raise ArtifactError(
                f"{self._path} has a damaged line ({line[:40]!r}...); delete that line, and its row is asked again"
            ) from None
        return content

    def _count(self, content: Mapping[str, Any]) -> None:
        self.spent += np.asarray(content.get("spent", (0, 0, 0)), np.int64)
        if "id" not in content:
            return
        self.done.add(Key(content["prompt"], content["split"], content["id"]))
        if "probabilities" in content:
            self.good += 1
        else:
            self.bad.append({name: content[name] for name in ("split", "id", "unanswered")})

    def append(self, content: Mapping[str, Any]) -> None:
        """Write a line, in one piece: a killed process leaves it whole or cut, never mixed with another."""
        line = json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        end = os.lseek(self._file, 0, os.SEEK_END)
        if os.write(self._file, line) != len(line):
            os.ftruncate(self._file, end)  # others write on, until they hear of it
            raise OSError(28, "no space left for an answer", str(self._path))
        self._unsynchronised = True
        self._count(content)

    def answer(self, key: Key, found: np.ndarray | str) -> None:
        """Keep the probabilities of a row, or why there are none."""
        said = (
            {"unanswered": found} if isinstance(found, str) else {"probabilities": [float(f"{p:.6g}") for p in found]}
        )
        self.append({"prompt": key.prompt, "split": key.split, "id": key.id, **said})

    def answers(self) -> Iterator[tuple[Key, list[float] | None]]:
        """Read all answers again, in the order in which they came."""
        for line in self._lines():
            content = self._read(line)
            if "id" in content:
                yield Key(content["prompt"], content["split"], content["id"]), content.get("probabilities")

    def synchronise(self) -> None:
        """Have the system write to the disk what it holds."""
        if self._unsynchronised:
            os.fsync(self._file)
            self._unsynchronised = False


class Ledger:
    """Holds requests back that could pass a limit, counting those under way by what they may cost at most."""

    def __init__(self, log: AnswerLog, settings: AskSettings) -> None:
        self._log, self._settings = log, settings
        self._under_way = 0
        self._changed = asyncio.Event()

    async def reserve(self, tokens: tuple[int, int]) -> None:
        """Wait until a request of so many tokens surely fits, and count it."""
        most = np.array((1, *tokens))
        while not self._fits(self._log.spent + most):
            if not self._under_way:
                raise BudgetSpentError
            self._changed.clear()
            await self._changed.wait()
        self._under_way += 1
        self._log.append({"spent": most.tolist()})

    def settle(self, reserved: tuple[int, int], used: tuple[int, int]) -> None:
        """Correct what was reserved."""
        self._under_way -= 1
        if used != reserved:
            self._log.append({"spent": [0, used[0] - reserved[0], used[1] - reserved[1]]})
        self._changed.set()

    def _fits(self, spent: np.ndarray) -> bool:
        settings, (requests, read, written) = self._settings, spent.tolist()
        cost = settings.cost(read, written)
        return not (
            (settings.max_requests is not None and requests > settings.max_requests)
            or (settings.max_tokens is not None and read + written > settings.max_tokens)
            or (settings.max_cost is not None and cost is not None and cost > settings.max_cost)
        )


def collect(log: AnswerLog, prompt: int, parts: Mapping[str, Dataset], labels: int) -> dict[str, np.ndarray]:
    """Bring the answers into the order of the rows: float64 (rows, labels) a split, NaN where there is none."""
    tables = {split: np.full((len(rows), labels), np.nan) for split, rows in parts.items()}
    ids = {split: read_column(rows, "id").to_pylist() for split, rows in parts.items()}
    places = {split: {name: place for place, name in enumerate(names)} for split, names in ids.items()}
    for key, answer in log.answers():
        place = places.get(key.split, {}).get(key.id)
        if key.prompt == prompt and place is not None and answer is not None:
            tables[key.split][place] = answer
    return tables


def write_tables(folder: Path, asked: AskedRows, log: AnswerLog, prompt: int, temperature: float) -> int:
    """Write the probabilities, and the rows that have some."""
    from kdlora.asking.audit import temper

    audited = {asked.audit_split: asked.audit} if asked.audit is not None and asked.audit_split == "validation" else {}
    parts = {**asked.parts, **audited}
    tables = collect(log, prompt, parts, asked.task.num_labels)
    answered = {split: ~np.isnan(table).any(axis=1) for split, table in tables.items()}
    if not any(mask.any() for mask in answered.values()):
        raise DataError(f"none of the {len(log.bad)} rows that were asked about has an answer; see {folder / ANSWERS}")
    names = asked.task.label_names
    kept = {split: temper(tables[split][mask], temperature) for split, mask in answered.items() if mask.any()}
    ids = {split: read_column(parts[split], "id").filter(pa.array(answered[split])) for split in kept}
    columns: dict[str, Any] = {"id": pa.chunked_array([chunk for one in ids.values() for chunk in one.chunks])}
    if list(kept) != ["train"]:
        columns["split"] = pa.array([split for split, table in kept.items() for _ in range(len(table))])
    together = np.concatenate(list(kept.values()))
    for place, name in enumerate(names):
        columns[LOGIT + name if name in _RESERVED else name] = pa.array(together[:, place], pa.float32())
    for split in asked.parts:
        if split in kept:
            _write_rows(folder / f"{split}.parquet", asked, split, answered[split], kept[split])
    write_table(folder / TABLE, columns)
    return len(together)


def _write_rows(path: Path, asked: AskedRows, split: str, answered: np.ndarray, table: np.ndarray) -> None:
    """Write the rows with an answer: with people's label where there is one, else with the likeliest."""
    rows, mask = asked.parts[split], pa.array(answered)
    columns: dict[str, Any] = {"id": read_column(rows, "id").filter(mask)}
    for name, column in zip(("text", "text_pair"), asked.task.text, strict=False):
        columns[column] = read_column(rows, name).filter(mask)
    if split == "train":
        codes = read_column(rows, "label").filter(mask).to_numpy() if asked.is_labelled else table.argmax(axis=1)
        columns[asked.task.label[0]] = pa.array(np.asarray(asked.task.label_names)[codes])
    write_table(path, columns)
