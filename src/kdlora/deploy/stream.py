"""Classify a file or a stream in bounded memory; an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from kdlora.data.lines import Format
from kdlora.data.tags import Words
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.network import BATCH_SIZE, Network
from kdlora.deploy.predict import MOST_CHARACTERS, Classifier, Prediction, most_characters
from kdlora.deploy.rows import Columns, Row, RowReader, cut_windows
from kdlora.deploy.tagger import Answer, Model, Tagger, load_for_many, load_model
from kdlora.errors import ArtifactError, ConfigError, DataError, harmless_json
from kdlora.extras import check_installed
from kdlora.system.integrity import compare
from kdlora.system.ownership import MANIFEST, check_folder, is_ours_by_name, read_manifest, remove, remove_abandoned
from kdlora.system.storage import atomic_file, hold_lock, mark_folder, temporary_name

Progress = Callable[[int, float | None], None]
"""Called with the rows done and the share of the input read (None for a stream)."""
Answers = list[tuple[Row, Answer | None]]

_SUFFIXES = {".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_to_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make an encoder for every row
_PART = re.compile(r"part-[0-9]{8}-[0-9]{1,18}-[0-9]{1,18}")
"""Name of a part: its number, rows and bad rows, so that a part is whole or absent."""


@dataclass(frozen=True)
class PredictionSummary:
    """What a prediction run did."""

    to: str  # the output file, or "-"
    rows: int  # in the output, bad ones included
    errors: int  # bad rows among them
    resumed: int  # rows that an interrupted run had done before
    seconds: float  # wall-clock time of this run


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
    resume: bool = True,
    progress: Progress | None = None,
) -> PredictionSummary:
    """Classify every row of a file or of standard input, in input order, or mark the entities of every row.

    Rows are read in windows; within a window they are batched by length. Each window is on disk before the next is
    read, so an interrupted run resumes; the output file appears when it is whole.

    Args:
        model: a classifier or a tagger, or the folder of one; of an experiment its export is taken where it has one.
        source: CSV, TSV, JSON Lines, Parquet or text file (one text a line), or "-" for standard input.
        to: CSV, JSON Lines or Parquet file by extension, or "-" for JSON Lines on standard output. Entities are written
            as JSON Lines.
        text: text column, or the two of a pair; by default those of the training data, or `text` (and `text_pair`), or
            the only one left, with a warning.
        id_column: copied to the output; rows are numbered from 0 where the input has no such column.
        input_format: by default from the extension; standard input is one text a line.
        batch_size: most texts in one forward pass.
        strict: stop at the first bad row instead of writing an error entry.
        resume: go on after an interrupted run; False starts again.
        progress: called after each window.

    Returns:
        Counts and time.

    Raises:
        DataError: no such file or column, an unknown format, or a bad row under `strict` (no output then).
        ArtifactError: the interrupted run that would be resumed was of another input or model.
        ModelError: not a model folder.

    Examples:
        >>> predict_file("runs/reviews/student", "reviews.csv", "predicted.csv", text="review").rows
        120
    """
    start = time.perf_counter()
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}.")
    classifier = load_for_many(model, load_model) if isinstance(model, str | Path) else model
    columns = text_columns(classifier, text, id_column)
    reader = RowReader(source, columns, form=input_format)
    output = _Output(_Form(classifier.folder, str(to)))
    if str(to) != "-":
        refuse_replacing(source, Path(to))
        made_of = _fingerprint(classifier, source, columns, reader.form) | {"strict": strict, "batch_size": batch_size}
        # A stream cannot be known to be the same one again.
        output = PartialResult(output.form, Path(to), made_of, resume=resume and str(source) != "-")
    reader.start = output.resumed
    answered = read_answers(classifier, reader, batch_size, refusal="." if strict else "")
    with output, contextlib.closing(answered):
        for answers in answered:
            output.add(answers)
            if progress is not None:
                progress(output.rows, reader.fraction())
    return PredictionSummary(str(to), output.rows, output.errors, output.resumed, time.perf_counter() - start)


def read_answers(model: Model, reader: RowReader, batch_size: int, *, refusal: str) -> Generator[Answers]:
    """Give rows with their answers, window by window; a bad row has none, or ends it where a `refusal` follows."""
    reads_whole = isinstance(model, Tagger) or model.folder.windows is not None
    with contextlib.closing(iter(reader)) as rows:
        for window in cut_windows(rows, MOST_CHARACTERS if reads_whole else None):
            texts = [row.text for row in window if row.text is not None]
            if refusal and len(texts) < len(window):
                fault = next(row.error for row in window if row.text is None)
                raise DataError(f"{reader.name}: {fault.rstrip('.')}{refusal}")
            found: Iterator[Answer] = iter(model.predict(texts, batch_size=batch_size))  # type: ignore[arg-type]
            yield [(row, None if row.text is None else next(found)) for row in window]


def text_columns(classifier: Network, text: Sequence[str] | str | None, id_column: str = "id") -> Columns:
    names = (text,) if isinstance(text, str) else (tuple(text) if text is not None else None)
    if names is not None and len(names) not in (1, 2):
        raise ConfigError(f"expected one text column or the two of a pair, got {len(names)}: {', '.join(names)}.")
    folder = classifier.folder
    recorded = tuple((folder.task or {}).get("text") or ()) or None
    is_tagger = folder.kind == "tokens"
    most = None if is_tagger else most_characters(folder.max_length, folder.windows)
    coded, texts = bool((folder.task or {}).get("coded")), 1 if is_tagger else folder.texts
    return Columns(names, recorded, id_column, most, words=is_tagger, coded=coded, texts=texts)


def _fingerprint(classifier: Network, source: str | Path, columns: Columns, input_format: str) -> dict[str, Any]:
    folder = classifier.folder
    weights = [folder.file] if folder.file is not None else sorted(folder.path.glob("*.safetensors"))
    weights += folder.path.glob("tokenizer.json")
    state = Path(source).stat() if str(source) != "-" else None
    return {
        "source": _in_utf8(Path(source)) if state else "-",
        "source_bytes": state.st_size if state else None,
        "source_time": state.st_mtime_ns if state else None,
        "model": _in_utf8(folder.path),
        "settings": dict(folder.digests),
        "weights": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "runs_on": [folder.backend, folder.precision],
        "threshold": None if (promise := classifier.decisions.promise) is None else promise.threshold,
        "thresholds": dict(classifier.decisions.thresholds),
        "max_length": folder.max_length,
        "text": list(columns.text) if columns.text else None,
        "id": columns.id,
        "input_format": input_format,
    }


def _in_utf8(path: Path) -> str:
    """Name a place in a text that can be written, whatever bytes its name has."""
    return str(path.absolute()).encode("utf-8", "backslashreplace").decode()


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
        if folder.kind == "multi-label" and self.name == "csv" and any("|" in name for name in folder.label_names):
            raise DataError(f"{to}: in CSV | stands between labels, and a label's name holds one; name a .jsonl file.")
        if self.name == "parquet":
            check_installed("writing Parquet", "parquet")
        several = folder.kind == "regression" and len(folder.label_names) > 1  # of a model that is not ours
        self._kind = "multi-label" if several else folder.kind
        labels = () if folder.kind == "regression" else folder.label_names
        self._columns = ["id", "label", *(f"probability:{name}" for name in labels), "error"]

    def encode(self, answers: Answers) -> bytes:
        """Write rows; one without prediction gets its error."""
        if self.name == "jsonl":
            return "".join(f"{_to_json(_as_object(*one))}\n" for one in answers).encode()
        rows = [self._values(*one) for one in answers]
        if self.name == "csv":
            return csv_bytes(rows)
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns, buffer = dict(zip(self._columns, zip(*rows, strict=True), strict=True)), io.BytesIO()
        pq.write_table(pa.Table.from_pydict(columns, self._schema()), buffer)
        return buffer.getvalue()

    def join(self, parts: Iterable[Path], to: Path) -> None:
        if self.name == "parquet":
            import pyarrow.parquet as pq

            with pq.ParquetWriter(to, self._schema()) as writer:
                for part in parts:
                    writer.write_table(pq.read_table(part, schema=self._schema()))
            return
        with to.open("wb") as file:
            file.write(csv_bytes([self._columns]) if self.name == "csv" else b"")
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, file, 1 << 20)

    def _values(self, row: Row, prediction: Answer | None) -> list[Any]:
        if not isinstance(prediction, Prediction):
            return [row.id, *([None] * (len(self._columns) - 2)), row.error]
        label: Any = prediction.label
        label = "|".join(label) if self.name == "csv" and isinstance(label, tuple) else label
        return [row.id, label, *prediction.probabilities.values(), None]

    def _schema(self) -> Any:
        import pyarrow as pa

        label = {"regression": pa.float64(), "multi-label": pa.list_(pa.string())}.get(self._kind, pa.string())
        numbers = [pa.float64()] * (len(self._columns) - 3)
        return pa.schema(list(zip(self._columns, [pa.string(), label, *numbers, pa.string()], strict=True)))


def _as_object(row: Row, prediction: Answer | None) -> dict[str, Any]:
    if prediction is None:
        return {"id": row.id, "error": row.error}
    if not isinstance(prediction, Prediction):
        joined = {"text": row.text.text} if isinstance(row.text, Words) else {}  # as no file has it
        return {"id": row.id, **joined, "entities": [asdict(entity) for entity in prediction]}
    found: dict[str, Any] = {"id": row.id, "label": prediction.label}
    found |= {"deferred": prediction.deferred} if prediction.deferred else {}
    return found | ({"probabilities": prediction.probabilities} if prediction.probabilities else {})


def csv_bytes(rows: Iterable[Sequence[Any]]) -> bytes:
    """Write rows as CSV; bytes that were no UTF-8 where they were read stay what they were."""
    lines: list[str] = []
    writer = SimpleNamespace(write=lambda line: lines.append(f"{line[:-2]}\n"))
    csv.writer(writer, lineterminator="\r\n").writerows(rows)  # so that Python 3.11 quotes what holds \r, too
    return "".join(lines).encode(errors="surrogateescape")


def standard_output() -> BinaryIO:
    """Give standard output as it takes bytes; that of a notebook takes text alone."""
    own = sys.stdout
    if own is None:
        raise DataError("standard output is closed; name a file with --to.")
    to_text: Any = SimpleNamespace(write=lambda content: own.write(content.decode(errors="replace")), flush=own.flush)
    found: BinaryIO = getattr(own, "buffer", to_text)
    return found


def refuse_replacing(source: str | Path, to: Path) -> None:
    """Refuse an output in the place of its own input, and of what is no file."""
    if to.exists() and not to.is_file():
        raise ConfigError(f"{to} is a folder, a pipe or a device; name a file with --to, or - for standard output.")
    if str(source) != "-" and to.exists() and to.samefile(source):
        raise ConfigError(f"{to} would replace the rows that it is made from; name another file with --to.")


class _Output(contextlib.AbstractContextManager["_Output"]):
    """Standard output, which gets the windows as they come; nothing can be resumed or taken back."""

    def __init__(self, form: _Form) -> None:
        self.form = form
        self.rows = self.errors = self.resumed = 0

    def add(self, answers: Answers) -> None:
        errors = sum(answer is None for _, answer in answers)
        self.write(self.form.encode(answers), len(answers), errors)
        self.rows, self.errors = self.rows + len(answers), self.errors + errors

    def write(self, content: bytes, rows: int, errors: int) -> None:
        file = standard_output()
        file.write(harmless_json(content.decode()).encode())
        file.flush()

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        """End the output, as is fit after that fault or none."""


class PartialResult(_Output):
    """The folder beside an output file that holds finished parts until the last one is written."""

    def __init__(self, form: _Form, to: Path, made_of: dict[str, Any], *, resume: bool) -> None:
        """Make the folder, or take over that of an interrupted run."""
        super().__init__(form)
        self.to, self.folder = to, to.with_name(f"{to.name}.partial")
        self._refuse_foreign()
        check_folder(self.folder, "prediction")
        with contextlib.suppress(FileNotFoundError):  # too long a name is told before the work, not at its end
            temporary_name(to).lstat()
        what, remedy = f"writes predictions into {to}", ", or name another file with --to"
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(hold_lock(self.folder / ".lock", what, remedy=remedy))
            except (OSError, NotImplementedError) as fault:  # a disk that knows no locks is written all the same
                if getattr(fault, "errno", errno.ENOSYS) not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            self._take_over(made_of | {"output_format": form.name}, resume=resume)
            self._lock = stack.pop_all()
        counts = [tuple(map(int, part.name.split("-")[2:])) for part in self._parts()]
        self.rows = self.resumed = sum(rows for rows, _ in counts)
        self.errors = sum(errors for _, errors in counts)

    def _take_over(self, made_of: dict[str, Any], *, resume: bool) -> None:
        parts, found = self._parts(), read_manifest(self.folder)
        if resume and found is not None:
            for key in compare(found, made_of):
                raise ArtifactError(
                    f"{self.folder}: holds an interrupted prediction of something else ({key} was {found.get(key)!r}, "
                    f"is {made_of[key]!r}). Give the same again, or delete the folder."
                )
        is_whole = [int(part.name.split("-")[1]) for part in parts] == list(range(len(parts)))
        if not resume or not is_whole:  # a kill while the folder was being removed left some
            for part in parts:
                remove(part)
        mark_folder(self.folder, "prediction", **made_of)
        remove_abandoned(self.folder)

    def write(self, content: bytes, rows: int, errors: int) -> None:
        with atomic_file(self.folder / f"part-{len(self._parts()):08d}-{rows}-{errors}") as temporary:
            temporary.write_bytes(content)

    def __exit__(self, kind: object, fault: BaseException | None, trace: object) -> None:
        with self._lock:
            if fault is None:
                with atomic_file(self.to) as temporary:
                    self.form.join(self._parts(), temporary)
            if fault is None or isinstance(fault, DataError):  # then the input must change: the parts are of no use
                self._refuse_foreign()
                self._lock.close()  # some systems remove no file that is open
                remove(self.folder)

    def _parts(self) -> list[Path]:
        return sorted(entry for entry in self.folder.iterdir() if _PART.fullmatch(entry.name))

    def _refuse_foreign(self) -> None:
        """See that nothing of others is lost with the folder of parts, and that it is no link to theirs."""
        for entry in [self.folder] if self.folder.is_symlink() or self.folder.is_file() else self.folder.glob("*"):
            known = _PART.fullmatch(entry.name) or entry.name in (MANIFEST, ".lock") or is_ours_by_name(entry)
            if not known or entry.is_symlink():
                raise ArtifactError(
                    f"{entry} was not made by kdlora and would be lost; move it away, or name another file with --to"
                )
