"""Write predictions: parts that survive an interruption, joined into one file at the end."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.predict import Prediction
from kdlora.deploy.rows import Row
from kdlora.errors import ArtifactError, DataError
from kdlora.system.ownership import (
    MANIFEST,
    claim_folder,
    is_ours_by_name,
    read_manifest,
    remove,
    remove_abandoned,
)
from kdlora.system.storage import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

OutputFormat = Literal["csv", "jsonl", "parquet"]
_SUFFIXES: dict[str, OutputFormat] = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_LABEL_SEPARATOR = "|"
_PART = re.compile(r"part-([0-9]{8})-([0-9]{1,18})-([0-9]{1,18})")


def choose_output_format(to: str) -> OutputFormat:
    """Choose by extension; standard output is JSON Lines."""
    if to == "-":
        return "jsonl"
    suffix = Path(to).suffix.lower()
    if suffix not in _SUFFIXES:
        raise DataError(f"{to}: expected an output file of {', '.join(_SUFFIXES)}, got {suffix or 'no extension'!r}.")
    return _SUFFIXES[suffix]


class ResultFormat:
    """Rows of predictions as bytes: id, label, a probability for each label, error."""

    def __init__(self, folder: ModelFolder, format: OutputFormat) -> None:  # noqa: A002
        """Settle the columns."""
        self.format = format
        self._kind = folder.kind
        self._labels = () if folder.kind == "regression" else folder.label_names

    def header(self) -> bytes:
        """Give what stands before the first row."""
        return _csv_bytes([self._names()]) if self.format == "csv" else b""

    def encode(self, rows: Sequence[Row], predictions: Sequence[Prediction | None]) -> bytes:
        """Write rows; a row without prediction gets its error."""
        if self.format == "jsonl":
            lines = [json.dumps(_as_object(*pair), ensure_ascii=False) for pair in zip(rows, predictions, strict=True)]
            return "".join(f"{line}\n" for line in lines).encode()
        table = [self._values(row, prediction) for row, prediction in zip(rows, predictions, strict=True)]
        if self.format == "csv":
            return _csv_bytes([["" if value is None else _flat(value) for value in row] for row in table])
        return self._parquet_bytes(table)

    def _names(self) -> list[str]:
        """Name the columns of CSV and Parquet."""
        return ["id", "label", *(f"probability:{name}" for name in self._labels), "error"]

    def _values(self, row: Row, prediction: Prediction | None) -> list[Any]:
        """Give the values of one row of CSV or Parquet."""
        if prediction is None:
            return [row.id, None, *([None] * len(self._labels)), row.error]
        label = list(prediction.label) if isinstance(prediction.label, tuple) else prediction.label
        return [row.id, label, *(prediction.probabilities[name] for name in self._labels), None]

    def schema(self) -> pa.Schema:
        """Give the types of the Parquet columns."""
        import pyarrow as pa

        label = {"regression": pa.float64(), "multi-label": pa.list_(pa.string())}.get(self._kind, pa.string())
        numbers = [pa.float64()] * len(self._labels)
        return pa.schema(list(zip(self._names(), [pa.string(), label, *numbers, pa.string()], strict=True)))

    def _parquet_bytes(self, table: list[list[Any]]) -> bytes:
        """Write a Parquet file in memory."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.schema()
        columns = [pa.array(values, kind) for values, kind in zip(zip(*table, strict=True), schema.types, strict=True)]
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), buffer)
        return buffer.getvalue()


@dataclass(frozen=True)
class _Part:
    """Predictions of consecutive rows on disk; the counts are in the name, so that a part is whole or absent."""

    path: Path
    number: int
    rows: int
    errors: int


class PartialResult:
    """The folder beside an output file that holds finished parts until the last one is written."""

    def __init__(self, to: Path, fingerprint: dict[str, Any]) -> None:
        """Describe; nothing is read or written yet."""
        self.to = to
        self.folder = to.with_name(f"{to.name}.partial")
        self._fingerprint = json.loads(json.dumps(fingerprint))

    def begin(self, *, resume: bool) -> tuple[int, int]:
        """Make the folder, or take over the one of an interrupted run."""
        self._refuse_foreign()
        if not resume:
            remove(self.folder)
        elif found := read_manifest(self.folder):
            changed = sorted(key for key in self._fingerprint if found.get(key) != self._fingerprint[key])
            if changed:
                key = changed[0]
                raise ArtifactError(
                    f"{self.folder}: holds an interrupted prediction of something else ({key} was {found.get(key)!r}, "
                    f"is {self._fingerprint[key]!r}). Delete the folder, or predict without resuming."
                )
        claim_folder(self.folder, "prediction", **self._fingerprint)
        remove_abandoned(self.folder)
        parts = list(self._parts())
        return sum(part.rows for part in parts), sum(part.errors for part in parts)

    def _refuse_foreign(self) -> None:
        """See that all that stands in the place of the parts is ours."""
        if not os.path.lexists(self.folder):
            return
        if self.folder.is_symlink() or not self.folder.is_dir() or read_manifest(self.folder) is None:
            raise ArtifactError(
                f"{self.folder} stands where the parts of {self.to.name} would go, and was not made by kdlora; move it "
                "away, or name another file with --to"
            )
        for entry in self.folder.iterdir():
            known = _PART.fullmatch(entry.name) or entry.name == MANIFEST or is_ours_by_name(entry)
            if not known or entry.is_symlink():
                raise ArtifactError(f"{entry} was not made by kdlora and would be lost; move it away")

    def add(self, content: bytes, rows: int, errors: int) -> None:
        """Write one part, atomically."""
        number = len(list(self._parts()))
        with atomic_file(self.folder / f"part-{number:08d}-{rows}-{errors}") as temporary:
            temporary.write_bytes(content)

    def finish(self, form: ResultFormat) -> None:
        """Join the parts into the output file, which appears whole, and remove them."""
        with atomic_file(self.to) as temporary:
            if form.format == "parquet":
                self._join_parquet(temporary, form)
            else:
                with temporary.open("wb") as file:
                    file.write(form.header())
                    for part in self._parts():
                        with part.path.open("rb") as source:
                            shutil.copyfileobj(source, file, 1 << 20)
        self.discard()

    def discard(self) -> None:
        """Remove the parts."""
        self._refuse_foreign()
        remove(self.folder)

    def _join_parquet(self, temporary: Path, form: ResultFormat) -> None:
        """Copy the parts as row groups."""
        import pyarrow.parquet as pq

        with pq.ParquetWriter(temporary, form.schema()) as writer:
            for part in self._parts():
                writer.write_table(pq.read_table(part.path, schema=form.schema()))

    def _parts(self) -> Iterator[_Part]:
        """List the finished parts in order."""
        for path in sorted(self.folder.iterdir()):
            if found := _PART.fullmatch(path.name):
                yield _Part(path, *map(int, found.groups()))


def _as_object(row: Row, prediction: Prediction | None) -> dict[str, Any]:
    """Make the JSON object of one row."""
    if prediction is None:
        return {"id": row.id, "error": row.error}
    found: dict[str, Any] = {"id": row.id, "label": prediction.label}
    return found | ({"probabilities": prediction.probabilities} if prediction.probabilities else {})


def _flat(value: Any) -> Any:
    """Write a list of labels into one CSV value."""
    return _LABEL_SEPARATOR.join(value) if isinstance(value, list) else value


def _csv_bytes(table: Sequence[Sequence[Any]]) -> bytes:
    """Write CSV rows."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(table)
    return buffer.getvalue().encode()
