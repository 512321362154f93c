"""Classify a file or a stream in bounded memory; a file of answers appears when it is whole."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from kdlora.data.lines import Format
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.network import BATCH_SIZE, Network
from kdlora.deploy.predict import MOST_CHARACTERS, Classifier, Prediction, most_characters
from kdlora.deploy.rows import Columns, Row, RowReader, cut_windows
from kdlora.deploy.tagger import Entity, Tagger, load_model
from kdlora.errors import ConfigError, DataError, harmless_json
from kdlora.extras import check_installed
from kdlora.system.storage import atomic_file

if TYPE_CHECKING:
    import pyarrow as pa

Progress = Callable[[int, float | None], None]
"""Called with the rows done and the share of the input read (None for a stream)."""
Answers = Sequence[tuple[Row, Prediction | list[Entity] | None]]

_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every row


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction run did."""

    to: str  # the output file, or "-"
    rows: int  # in the output, bad ones included
    errors: int  # bad rows among them
    seconds: float  # wall-clock time


def predict_file(
    model: Classifier | Tagger | str | Path,
    source: str | Path,
    to: str | Path = "-",
    *,
    text: Sequence[str] | str | None = None,
    id_column: str = "id",
    input_format: Format | None = None,
    batch_size: int = BATCH_SIZE,
    strict: bool = False,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Classify every row of a file or of standard input, in input order, or mark the entities of every row.

    Rows are read in windows; within a window they are batched by length. The output file appears when it is whole.

    Args:
        model: a classifier or a tagger, or the folder of one.
        source: CSV, TSV, JSON Lines, Parquet or text file (one text a line), or "-" for standard input.
        to: CSV, JSON Lines or Parquet file by extension, or "-" for JSON Lines on standard output. Entities are written
            as JSON Lines.
        text: text column, or the two of a pair; by default those of the training data, or `text` (and `text_pair`).
        id_column: copied to the output; rows are numbered from 0 where the input has none.
        input_format: by default from the extension; standard input is one text a line.
        batch_size: most texts in one forward pass.
        strict: stop at the first bad row instead of writing an error entry.
        progress: called after each window.

    Returns:
        Counts and time.

    Raises:
        DataError: no such file or column, an unknown format, or a bad row under `strict` (no output then).
        ConfigError: the output would replace the input.
        ModelError: not a model folder.

    Examples:
        >>> predict_file("runs/reviews/student", "reviews.csv", "predicted.csv", text="review").rows
        120
    """
    start = time.perf_counter()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    classifier = load_model(model) if isinstance(model, str | Path) else model
    reader = RowReader(source, _columns(classifier, text, id_column), form=input_format)
    form, rows, errors = _Form(classifier.folder, str(to)), 0, 0
    reads_whole = isinstance(classifier, Tagger) or classifier.folder.windows is not None
    with open_output(source, to) as file, form.writer(file) as write, contextlib.closing(iter(reader)) as given:
        for window in cut_windows(given, MOST_CHARACTERS if reads_whole else None):
            bad = [row for row in window if row.text is None]
            if bad and strict:
                raise DataError(f"{reader.name}: {bad[0].error}")
            texts = [row.text for row in window if row.text is not None]
            found: Iterator[Any] = iter(classifier.predict(texts, batch_size=batch_size))  # type: ignore[arg-type]
            write([(row, None if row.text is None else next(found)) for row in window])
            file.flush()
            rows, errors = rows + len(window), errors + len(bad)
            if progress is not None:
                progress(rows, reader.fraction())
    return PredictionSummary(str(to), rows, errors, time.perf_counter() - start)


@contextlib.contextmanager
def open_output(source: str | Path, to: str | Path) -> Iterator[BinaryIO]:
    """Open an output, or standard output for `-`; a file appears when it is whole, and never in its input's place."""
    if str(to) == "-":
        yield sys.stdout.buffer
        return
    if str(source) != "-" and Path(to).exists() and Path(to).samefile(source):
        raise ConfigError(f"{to} would replace the rows that it is made from; name another file with --to.")
    with atomic_file(to) as temporary, temporary.open("wb") as file:
        yield file


def _columns(classifier: Network, text: Sequence[str] | str | None, id_column: str) -> Columns:
    names = (text,) if isinstance(text, str) else (tuple(text) if text is not None else None)
    if names is not None and len(names) not in (1, 2):
        raise ConfigError(f"expected one text column or the two of a pair, got {len(names)}: {', '.join(names)}.")
    recorded = tuple((classifier.folder.task or {}).get("text") or ()) or None
    is_tagger = classifier.folder.kind == "tokens"
    if is_tagger and names is not None and len(names) > 1:
        raise ConfigError(f"entities are marked in one text column, got {', '.join(names)}.")
    folder = classifier.folder
    most = None if is_tagger else most_characters(folder.max_length, folder.windows)
    return Columns(names, recorded, id_column, most, words=is_tagger)


class _Form:
    """The format of an output: id, label, a probability for each label, error."""

    def __init__(self, folder: ModelFolder, to: str) -> None:
        suffix = ".jsonl" if to == "-" else Path(to).suffix.lower()
        if suffix not in _SUFFIXES:
            expected = ", ".join(_SUFFIXES)
            raise DataError(f"{to}: expected an output file of {expected}, got {suffix or 'no extension'!r}.")
        self.name = _SUFFIXES[suffix]
        if folder.kind == "tokens" and self.name != "jsonl":
            raise DataError(f"{to}: a row may have any number of entities; name a .jsonl file, which holds them.")
        if self.name == "parquet":
            check_installed("writing Parquet", "parquet")
        self._kind = folder.kind
        labels = () if folder.kind == "regression" else folder.label_names
        self._columns = ["id", "label", *(f"probability:{name}" for name in labels), "error"]

    @contextlib.contextmanager
    def writer(self, file: BinaryIO) -> Iterator[Callable[[Answers], object]]:
        """Give what writes some rows; one without prediction gets its error."""
        if self.name == "parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            with pq.ParquetWriter(file, schema := self._schema()) as parquet:
                yield lambda answers: parquet.write_batch(
                    pa.record_batch(list(map(pa.array, zip(*self._rows(answers), strict=True), schema.types)), schema)
                )
        elif self.name == "csv":
            file.write(csv_bytes([self._columns]))
            yield lambda answers: file.write(csv_bytes(self._rows(answers)))
        else:
            yield lambda answers: file.write(
                "".join(f"{harmless_json(_to_json(_as_object(*one)))}\n" for one in answers).encode()
            )

    def _rows(self, answers: Answers) -> list[list[Any]]:
        return [self._values(*one) for one in answers]

    def _values(self, row: Row, prediction: Prediction | list[Entity] | None) -> list[Any]:
        if not isinstance(prediction, Prediction):
            return [row.id, *([None] * (len(self._columns) - 2)), row.error]
        label: Any = prediction.label
        if isinstance(label, tuple):
            label = "|".join(label) if self.name == "csv" else list(label)
        return [row.id, label, *prediction.probabilities.values(), None]

    def _schema(self) -> pa.Schema:
        import pyarrow as pa

        label = {"regression": pa.float64(), "multi-label": pa.list_(pa.string())}.get(self._kind, pa.string())
        numbers = [pa.float64()] * (len(self._columns) - 3)
        return pa.schema(list(zip(self._columns, [pa.string(), label, *numbers, pa.string()], strict=True)))


def _as_object(row: Row, prediction: Prediction | list[Entity] | None) -> dict[str, Any]:
    if prediction is None:
        return {"id": row.id, "error": row.error}
    if not isinstance(prediction, Prediction):
        return {"id": row.id, "entities": [asdict(entity) for entity in prediction]}
    found: dict[str, Any] = {"id": row.id, "label": prediction.label}
    found |= {"deferred": prediction.deferred} if prediction.deferred else {}
    return found | ({"probabilities": prediction.probabilities} if prediction.probabilities else {})


def csv_bytes(rows: Iterable[Sequence[Any]]) -> bytes:
    """Write rows as CSV; bytes that were no UTF-8 where they were read stay what they were."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue().encode(errors="surrogateescape")
