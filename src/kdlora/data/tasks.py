"""What is learnt: the task, and the table of GLUE's tasks. Light: no torch, no datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from kdlora.config import GlueName, Kind
from kdlora.errors import DataError, did_you_mean

ProblemType = Literal["single_label_classification", "regression", "multi_label_classification"]

PROBLEM_TYPES: dict[Kind, ProblemType] = {
    "single-label": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
"""Our kinds in the words of a transformers config."""

DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "single-label": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "multi-label": ("micro_f1",),
}
"""What scores a user's own task; the score is the mean of these, times 100."""


@dataclass(frozen=True)
class Task:
    """What is learnt, and what every later stage must agree on.

    Attributes:
        kind: single-label, regression or multi-label.
        text: one text column, or the two columns of a pair.
        label: the label column; several for a multi-label task of 0/1 columns.
        label_names: one name per column of the logits, in that order; regression has one.
        metrics: the metrics whose mean, times 100, is the score.
        name: the GLUE task, or an empty string.
    """

    kind: Kind
    text: tuple[str, ...]
    label: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    name: str = ""

    @property
    def num_labels(self) -> int:
        """Number of columns of the logits."""
        return len(self.label_names)

    @property
    def is_pair(self) -> bool:
        """Whether an example is a pair of texts."""
        return len(self.text) == 2

    @property
    def id2label(self) -> dict[int, str]:
        """Column of the logits to label name, as in a transformers config."""
        return dict(enumerate(self.label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Label name to column of the logits, as in a transformers config."""
        return {label: column for column, label in enumerate(self.label_names)}

    @property
    def problem_type(self) -> ProblemType:
        """The kind in the words of a transformers config."""
        return PROBLEM_TYPES[self.kind]

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` reads it back."""
        return {
            "name": self.name,
            "kind": self.kind,
            "text": list(self.text),
            "label": list(self.label),
            "label_names": list(self.label_names),
            "metrics": list(self.metrics),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Read what `to_dict` wrote.

        Args:
            values: the dictionary of a run record or an experiment.

        Raises:
            DataError: a field is missing or the kind is unknown.
        """
        missing = [field for field in ("kind", "text", "label", "label_names", "metrics") if field not in values]
        if missing:
            raise DataError(f"a stored task lacks {', '.join(missing)}; it has {', '.join(values) or 'nothing'}")
        if values["kind"] not in PROBLEM_TYPES:
            raise DataError(
                f"a stored task has the kind {values['kind']!r}; expected one of {', '.join(PROBLEM_TYPES)}."
                + did_you_mean(str(values["kind"]), PROBLEM_TYPES)
            )
        return cls(
            kind=values["kind"],
            text=tuple(values["text"]),
            label=tuple(values["label"]),
            label_names=tuple(values["label_names"]),
            metrics=tuple(values["metrics"]),
            name=values.get("name", ""),
        )


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task: as the Hub has it, and as the benchmark's own files have it.

    Attributes:
        name: our name, which is also the subset of `nyu-mll/glue`.
        folder: folder of the benchmark's download.
        kind: single-label or regression.
        text: text columns on the Hub.
        file_text: text columns of the benchmark's files.
        file_label: label column of the benchmark's files; None where they carry none.
        label_names: label names in the Hub's order, which the codes 0, 1 ... of the files follow.
        metrics: the benchmark's metrics.
        files: split to file name; the groups of a split in several files after a slash.
        headerless: columns of the splits whose files have no header.
        headerless_splits: which splits those are.
        other_folders: further names of the folder.
    """

    name: GlueName
    folder: str
    kind: Kind
    text: tuple[str, ...]
    file_text: tuple[str, ...]
    file_label: str | None
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    files: Mapping[str, str]
    headerless: tuple[str, ...] = ()
    headerless_splits: frozenset[str] = frozenset()
    other_folders: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """The task, with the Hub's column names."""
        return Task(self.kind, self.text, ("label",), self.label_names, self.metrics, self.name)


_FILES = {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
_MNLI_FILES = {
    "train": "train.tsv",
    "validation/matched": "dev_matched.tsv",
    "validation/mismatched": "dev_mismatched.tsv",
    "test/matched": "test_matched.tsv",
    "test/mismatched": "test_mismatched.tsv",
}
_SENTENCES = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_PREMISE = ("premise", "hypothesis")
_ENTAILMENT = ("entailment", "not_entailment")
_THREE_WAY = ("entailment", "neutral", "contradiction")
_ACCURACY = ("accuracy",)
_ACCURACY_F1 = ("accuracy", "f1")


def _glue(
    name: GlueName,
    folder: str,
    text: tuple[str, ...],
    label_names: tuple[str, ...],
    *,
    metrics: tuple[str, ...] = _ACCURACY,
    file_text: tuple[str, ...] | None = None,
    file_label: str | None = "label",
) -> GlueTask:
    """Write down a task with the usual three files, where only the columns differ."""
    return GlueTask(name, folder, "single-label", text, file_text or text, file_label, label_names, metrics, _FILES)


_TABLE = (
    GlueTask(
        name="cola",
        folder="CoLA",
        kind="single-label",
        text=("sentence",),
        file_text=("sentence",),
        file_label="label",
        label_names=("unacceptable", "acceptable"),
        metrics=("matthews",),
        files=_FILES,
        headerless=("source", "label", "mark", "sentence"),
        headerless_splits=frozenset({"train", "validation"}),
    ),
    _glue("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    _glue(
        "mrpc",
        "MRPC",
        _SENTENCES,
        ("not_equivalent", "equivalent"),
        metrics=_ACCURACY_F1,
        file_text=("#1 String", "#2 String"),
        file_label="Quality",
    ),
    GlueTask(
        name="stsb",
        folder="STS-B",
        kind="regression",
        text=_SENTENCES,
        file_text=_SENTENCES,
        file_label="score",
        label_names=("label",),
        metrics=("pearson", "spearman"),
        files=_FILES,
    ),
    _glue("qqp", "QQP", _QUESTIONS, ("not_duplicate", "duplicate"), metrics=_ACCURACY_F1, file_label="is_duplicate"),
    GlueTask(
        name="mnli",
        folder="MNLI",
        kind="single-label",
        text=_PREMISE,
        file_text=_SENTENCES,
        file_label="gold_label",
        label_names=_THREE_WAY,
        metrics=_ACCURACY,
        files=_MNLI_FILES,
    ),
    _glue("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT),
    _glue("rte", "RTE", _SENTENCES, _ENTAILMENT),
    _glue("wnli", "WNLI", _SENTENCES, ("not_entailment", "entailment")),
    GlueTask(
        name="ax",
        folder="AX",
        kind="single-label",
        text=_PREMISE,
        file_text=_SENTENCES,
        file_label=None,
        label_names=_THREE_WAY,
        metrics=("matthews",),
        files={"test": "diagnostic.tsv"},
        other_folders=("diagnostic",),
    ),
)

GLUE: dict[GlueName, GlueTask] = {entry.name: entry for entry in _TABLE}
"""Every GLUE task by our name; label names and their order are those of `nyu-mll/glue`."""
