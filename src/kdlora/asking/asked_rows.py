"""The rows that a language model is asked about: read, drawn and chosen; the examples that it is shown."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import yaml
from datasets import Dataset

from kdlora.asking.asksettings import LEAST_AUDIT_ROWS, AskSettings
from kdlora.asking.questions import Row
from kdlora.config import TaskConfig
from kdlora.configfile import expand_home
from kdlora.data.canonical import Reading
from kdlora.data.labels import infer_task
from kdlora.data.load import check_columns
from kdlora.data.logit_table import write_table
from kdlora.data.opening import KNOWN_COLUMNS, infer_columns
from kdlora.data.read import Source, open_file
from kdlora.data.spool import read_column, slice_rows, text_columns
from kdlora.data.tasks import Task
from kdlora.data.token_rows import SPANS, TAGS, holds_tokens
from kdlora.errors import ConfigError, DataError, first_line
from kdlora.system.integrity import hash_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AskedRows:
    """What is asked about, in canonical columns."""

    task: Task
    labels: Mapping[str, str]  # with descriptions
    parts: Mapping[str, Dataset]  # by split of the table
    chosen: Mapping[str, np.ndarray]  # places of the rows that the table is to have
    audit: tuple[str, np.ndarray] | None  # split and places of the audited rows
    examples: list[dict[str, Any]]
    sources: dict[str, str]  # hashes of the files


def read_labels(file: str) -> dict[str, str]:
    """Read a YAML file of label names, a list or a mapping to descriptions."""
    try:
        content = yaml.load(expand_home(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as fault:
        raise ConfigError(f"{file}: no file of labels can be read there ({first_line(fault)})") from None
    if isinstance(content, list):
        words = {name for name in content if isinstance(name, str)}
        content = dict.fromkeys(content, "") if len(words) == len(content) else None
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ConfigError(f"{file}: expected a list of different label names, or a mapping `name: what it means`")
    return {str(name): text for name, text in content.items()}


def read_asked_rows(data: str | Path, settings: AskSettings) -> AskedRows:
    source = open_file(expand_home(data), "the data", plain=True)
    task, labelled = _task(source, settings)
    if "id" in (*task.text, *task.label):
        raise ConfigError(f"{source.name}: rename the column 'id': what is written has the ids of rows under this name")
    labels = dict(settings.labels or dict.fromkeys(task.label_names, ""))
    reading = Reading(task, settings.id_column, ordered=settings.labels is not None)
    rows = reading.read({"": source}, labelled=labelled)
    parts, chosen = {"train": rows}, {"train": _choose(rows, settings)}
    if settings.unlabelled is not None:
        more = open_file(expand_home(settings.unlabelled), "unlabelled", plain=True)
        parts["unlabelled"] = reading.read({"": more}, labelled=False)
    audit, pool = None, np.arange(len(rows))
    if isinstance(settings.audit, str | Path):
        audited = open_file(expand_home(settings.audit), "audit")
        parts["validation"] = reading.read({"": audited}, labelled=True)
        audit = ("validation", np.arange(len(parts["validation"])))
        if len(audit[1]) < LEAST_AUDIT_ROWS:
            raise DataError(f"{settings.audit}: an audit takes at least {LEAST_AUDIT_ROWS} rows, found {len(audit[1])}")
    elif settings.audit is not None:
        if not labelled:
            raise ConfigError("these rows have no labels to draw an audit from; give audit a file of rows that have")
        if settings.audit > len(rows):
            raise DataError(f"an audit of {settings.audit} rows cannot be drawn from {len(rows)}")
        audit = ("train", _draw(len(rows), settings, 1)[: settings.audit])
        pool = np.setdiff1d(pool, audit[1])
    chosen |= {split: np.arange(len(part)) for split, part in parts.items() if split != "train"}
    examples = _examples(rows.select(pool) if labelled else None, settings)
    for note in dict.fromkeys(reading.notes):  # such as which label a 0 stands for
        logger.warning(note)
    files = {"data": data, "unlabelled": settings.unlabelled, "audit": settings.audit}
    sources = {name: hash_file(expand_home(file)) for name, file in files.items() if isinstance(file, str | Path)}
    return AskedRows(task, labels, parts, chosen, audit, examples, sources)


def each_row(rows: Dataset) -> Iterator[Row]:
    for table in slice_rows(rows, rows.column_names):
        yield from table.to_pylist()


def _task(source: Source, settings: AskSettings) -> tuple[Task, bool]:
    """Settle columns and labels, and whether people labelled the rows."""
    text = settings.text or (source.columns if source.plain else infer_columns(source, "text"))
    label: tuple[str, ...] = ()
    if settings.label is None:
        if not {column.casefold() for column in source.columns}.isdisjoint(KNOWN_COLUMNS["label"]):
            label = infer_columns(source, "label")
    elif settings.label in source.columns or not isinstance(settings.audit, str | Path):  # else in the audited rows
        label = (source.require(settings.label, "label"),)
    check_columns(text, label)
    names = tuple(settings.labels or ())
    if len({name.strip().casefold() for name in names} - {""}) != len(names):
        raise ConfigError("label names differ by more than case, and none is empty")
    if not label:
        if len(names) < 2:
            raise ConfigError(f"{source.name} has no label column; name the labels in a file: --labels FILE")
        for name in () if settings.text else (*SPANS, *TAGS):
            with contextlib.suppress(DataError):  # of a column that nobody asks about
                if name in source.columns and holds_tokens(source.read((text[0], name)), text[0], name):
                    raise ConfigError(
                        f"{source.name}: the column {name!r} holds spans or tags, and ask asks for one label of a "
                        "whole text. For names in a text give a tagger (teacher.fine_tuned) or a table with a list a "
                        "label; to ask about whole texts all the same, name their column: "
                        f"--text {' --text '.join(text)}"
                    )
        return Task("single-label", tuple(text), (settings.label or "label",), names, ("accuracy",)), False
    config = TaskConfig(kind="single-label", text=tuple(text), label=label, label_names=names or None)
    return infer_task(source.read(label), tuple(text), label, config)[0], True


def write_rows(path: Path, asked: AskedRows, rows: Dataset, codes: np.ndarray | None = None) -> None:
    """Write rows: with people's label where there is one, else with these."""
    columns: dict[str, Any] = {"id": read_column(rows, "id")}
    for name, column in zip(("text", "text_pair"), asked.task.text, strict=False):
        columns[column] = read_column(rows, name)
    if "label" in rows.column_names:
        codes = read_column(rows, "label").to_numpy()
    if codes is not None:
        columns[asked.task.label[0]] = pa.array(np.asarray(asked.task.label_names)[codes])
    write_table(path, columns)


def _draw(count: int, settings: AskSettings, purpose: int) -> np.ndarray:
    return np.random.default_rng([settings.seed, purpose]).permutation(count)


def _examples(rows: Dataset | None, settings: AskSettings) -> list[dict[str, Any]]:
    """Draw labelled rows, label by label in turn, so that every label has an example where there are enough."""
    if not settings.shots:
        return []
    if rows is None or len(rows) < settings.shots:
        raise ConfigError(f"{settings.shots} examples (shots) are drawn from rows with labels, and there are too few")
    order = _draw(len(rows), settings, 2)
    labels = read_column(rows, "label").to_numpy()[order]
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    chosen = order[np.argsort(turn, kind="stable")[: settings.shots]]
    return [rows[int(place)] for place in chosen]


def _choose(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Take the rows to be asked about; more of them later begin with these."""
    if settings.rows is None or settings.rows >= len(rows):
        return np.arange(len(rows))
    if settings.select == "random":
        order = _draw(len(rows), settings, 3)
    elif settings.select == "diverse":
        order = _spread(rows, settings)
    else:
        order = _doubts(rows, settings)
    return np.sort(order[: settings.rows])


def _spread(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Order rows so that one of each group of similar texts comes first: k-means of TF-IDF, nearest to its centre."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = read_column(rows, "text").to_pylist()
    try:
        words = TfidfVectorizer(sublinear_tf=True, max_features=20_000).fit_transform(texts)
    except ValueError:  # of an empty vocabulary
        raise DataError("select: diverse finds no words of two letters in these texts; take random") from None
    groups = MiniBatchKMeans(min(settings.rows or 1, 500), random_state=settings.seed, n_init=1, batch_size=2048).fit(
        words
    )
    near, turn = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    for number, centre in enumerate(groups.cluster_centers_):
        members = np.flatnonzero(groups.labels_ == number)
        near[members] = words[members] @ centre
        turn[members[np.argsort(-near[members], kind="stable")]] = np.arange(len(members))
    return np.lexsort((-near, turn))


def _doubts(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Order rows by how little the first student prefers its label to the next."""
    from kdlora.deploy.predict import Classifier

    model = Classifier.load(str(settings.select_by))
    if model.folder.kind == "regression":
        raise ConfigError(f"{settings.select_by}: a regression doubts nothing; name a model that gives probabilities")
    margins: list[float] = []
    for table in slice_rows(rows, text_columns(rows)):
        columns = [column.to_pylist() for column in table.columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        ordered = np.sort([[*found.probabilities.values()] for found in model.predict(texts)])
        margins += (ordered[:, -1] - ordered[:, -2]).tolist()
    return np.argsort(margins, kind="stable")
