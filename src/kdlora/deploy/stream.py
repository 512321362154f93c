"""Classify a file or a stream in bounded memory; an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.predict import BATCH_SIZE, Classifier, Prediction
from kdlora.deploy.results import PartialResult, ResultFormat, choose_output_format
from kdlora.deploy.rows import Columns, InputFormat, Row, RowReader
from kdlora.errors import ConfigError, DataError, harmless_json

Progress = Callable[[int, float | None], None]
"""Called with the rows done and the share of the input read (None for a stream)."""

WINDOW_ROWS = 4096
_WINDOW_CHARACTERS = 8_000_000


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction run did.

    Attributes:
        to: the output file, or "-".
        rows: in the output, bad ones included.
        errors: bad rows among them.
        resumed: rows that an interrupted run had done before.
        seconds: wall-clock time of this run.
    """

    to: str
    rows: int
    errors: int
    resumed: int
    seconds: float


def predict_file(
    model: Classifier | str | Path,
    source: str | Path,
    to: str | Path = "-",
    *,
    text: Sequence[str] | str | None = None,
    id_column: str = "id",
    input_format: InputFormat | None = None,
    batch_size: int = BATCH_SIZE,
    window_rows: int = WINDOW_ROWS,
    strict: bool = False,
    resume: bool = True,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Classify every row of a file or of standard input, in input order.

    Rows are read in windows; within a window they are batched by length. Each window is on disk before the next is
    read, so an interrupted run resumes; the output file appears when it is whole.

    Args:
        model: a classifier, or the folder of one.
        source: CSV, TSV, JSON Lines, Parquet or text file (one text a line), or "-" for standard input.
        to: CSV, JSON Lines or Parquet file by extension, or "-" for JSON Lines on standard output.
        text: text column, or the two of a pair; by default those of the training data, or `text` (and `text_pair`).
        id_column: copied to the output; rows are numbered from 0 where the input has none.
        input_format: by default from the extension; standard input is one text a line.
        batch_size: most texts in one forward pass.
        window_rows: most rows in memory.
        strict: stop at the first bad row instead of writing an error entry.
        resume: go on after an interrupted run; False starts again.
        progress: called after each window.

    Returns:
        Counts and time.

    Raises:
        DataError: no such file or column, an unknown format, or a bad row under `strict` (no output then).
        ArtifactError: the interrupted run that would be resumed was of another input or model.
        ModelError: not a model folder.
    """
    start = time.perf_counter()
    if batch_size < 1 or window_rows < 1:
        raise ConfigError(f"batch_size and window_rows must be at least 1, got {batch_size} and {window_rows}.")
    classifier = model if isinstance(model, Classifier) else Classifier.load(model)
    form = ResultFormat(classifier.folder, choose_output_format(str(to)))
    names = (text,) if isinstance(text, str) else (tuple(text) if text is not None else None)
    if names is not None and len(names) not in (1, 2):
        raise ConfigError(f"expected one text column or the two of a pair, got {len(names)}: {', '.join(names)}.")
    task = classifier.folder.task or {}
    recorded = tuple(task["text"]) if task.get("text") else None
    columns = Columns(names, recorded, id_column, classifier.encoder.most_characters)
    reader = RowReader(source, columns, format=input_format)
    run = _Run(classifier, form, reader, batch_size, window_rows, strict, progress)
    if str(to) == "-":
        return run.to_stream(start)
    if str(source) != "-" and Path(to).exists() and Path(to).samefile(source):
        raise ConfigError(f"{to} would replace the rows that it is made from; name another file with --to.")
    fingerprint = _fingerprint(classifier.folder, source, columns, reader.format, form.format)
    # A stream cannot be known to be the same one again.
    return run.to_file(PartialResult(Path(to), fingerprint), start, resume=resume and str(source) != "-")


@dataclass
class _Run:
    """One prediction run."""

    classifier: Classifier
    form: ResultFormat
    reader: RowReader
    batch_size: int
    window_rows: int
    strict: bool
    progress: Progress | None

    def to_stream(self, start: float) -> PredictionSummary:
        """Write to standard output as the windows come."""
        rows = errors = 0
        with contextlib.closing(iter(self.reader)) as source:
            for content, count, bad in self._windows(source):
                sys.stdout.buffer.write(harmless_json(content.decode()).encode())
                sys.stdout.buffer.flush()
                rows, errors = rows + count, errors + bad
                self._report(rows)
        return PredictionSummary("-", rows, errors, 0, time.perf_counter() - start)

    def to_file(self, partial: PartialResult, start: float, *, resume: bool) -> PredictionSummary:
        """Write parts, then join them."""
        resumed, errors = partial.begin(resume=resume)
        rows = resumed
        try:
            with contextlib.closing(iter(self.reader)) as source:
                for _ in range(resumed):
                    next(source, None)
                for content, count, bad in self._windows(source):
                    partial.add(content, count, bad)
                    rows, errors = rows + count, errors + bad
                    self._report(rows)
        except DataError:
            # The input must change before this can succeed, and parts of the old input are of no use then.
            partial.discard()
            raise
        partial.finish(self.form)
        return PredictionSummary(str(partial.to), rows, errors, resumed, time.perf_counter() - start)

    def _windows(self, source: Iterator[Row]) -> Iterator[tuple[bytes, int, int]]:
        """Classify window by window: (encoded rows, rows, bad rows)."""
        for rows in _cut_windows(source, self.window_rows):
            bad = [row for row in rows if row.text is None]
            if bad and self.strict:
                raise DataError(f"{self.reader.name}: {bad[0].error}")
            texts = [row.text for row in rows if row.text is not None]
            logits = self.classifier.predict_logits(texts, batch_size=self.batch_size)
            found = iter(self.classifier.to_predictions(logits))
            predictions: list[Prediction | None] = [None if row.text is None else next(found) for row in rows]
            yield self.form.encode(rows, predictions), len(rows), len(bad)

    def _report(self, rows: int) -> None:
        """Tell the caller how far the run is."""
        if self.progress is not None:
            self.progress(rows, self.reader.fraction())


def _cut_windows(source: Iterable[Row], most_rows: int) -> Iterator[list[Row]]:
    """Group rows by count and by characters, so that long texts do not fill the memory."""
    window: list[Row] = []
    characters = 0
    for row in source:
        window.append(row)
        characters += sum(map(len, row.text)) if isinstance(row.text, tuple) else len(row.text or "")
        if len(window) >= most_rows or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _fingerprint(
    folder: ModelFolder, source: str | Path, columns: Columns, input_format: str, output_format: str
) -> dict[str, Any]:
    """Collect all that decides the predictions and their form."""
    weights = [folder.file] if folder.file is not None else sorted(folder.path.glob("*.safetensors"))
    state = Path(source).stat() if str(source) != "-" else None
    return {
        "source": str(Path(source).absolute()) if state else "-",
        "source_bytes": state.st_size if state else None,
        "source_time": state.st_mtime_ns if state else None,
        "model": str(folder.path.absolute()),
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "temperature": folder.temperature,
        "max_length": folder.max_length,
        "text": list(columns.text) if columns.text else None,
        "id": columns.id,
        "input_format": input_format,
        "output_format": output_format,
    }
