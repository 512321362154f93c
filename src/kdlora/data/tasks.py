"""What is learnt: the task, and the table of GLUE's tasks. Light: no torch, no datasets."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from kdlora.config import DataConfig, GlueName, Kind
from kdlora.data.tags import tag_types
from kdlora.data.windows import WindowSettings
from kdlora.errors import MOST_LISTED, ConfigError, DataError, KdLoraError, did_you_mean, listed
from kdlora.section import Costs, OpenClassWeights

PROBLEM_TYPES: dict[Kind, str] = {
    "single-label": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
    "tokens": "token_classification",  # transformers knows it by the model's class
}
"""Our kinds in the words of a transformers config."""

DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "single-label": ("accuracy",),
    "regression": ("pearson", "spearman"),
    "multi-label": ("micro_f1",),
    "tokens": ("entity_f1",),
}
"""What scores a user's own task; the score is the mean of these, times 100."""

METRICS: dict[Kind, tuple[str, ...]] = {
    "single-label": ("accuracy", "macro_f1", "matthews", "balanced_accuracy", "average_precision", "f1"),
    "regression": ("pearson", "spearman", "r2"),
    "multi-label": ("micro_f1", "macro_f1", "subset_accuracy", "average_precision"),
    "tokens": ("entity_f1", "entity_precision", "entity_recall", "macro_entity_f1"),
}
"""What may score a user's own task; of a label also `f1:LABEL`, `average_precision:LABEL`, `recall@0.9:LABEL`, and of a
type of entity `recall:TYPE`."""

UNEVEN = 5
"""Where the largest class has more than so many times the rows of the smallest, accuracy says little of small ones."""

GENERIC_LABEL = re.compile(r"LABEL_\d+", re.IGNORECASE)
"""What a transformers config calls labels that nobody named."""
_LIST = re.compile(r"\s*[\[({].*[\])}]\s*", re.DOTALL)
"""A cell that a program wrote from a list; NumPy breaks long ones into lines."""
_OF_A_LABEL = ("f1", "average_precision")
_RECALL_AT = re.compile(r"recall@(0?\.\d*[1-9]\d*|1(\.0*)?)")


@dataclass(frozen=True)
class Task:
    """What is learnt, and what every later stage must agree on.

    Attributes:
        kind: single-label, regression, multi-label or tokens.
        text: one text column, or the two columns of a pair; of tokens the column of texts, or that of words.
        label: the label column; several for a multi-label task of 0/1 columns.
        label_names: one name per column of the logits, in that order; regression has one. Of tokens these are `O` and,
            for each type, `B-TYPE` and `I-TYPE`.
        metrics: the metrics whose mean, times 100, is the score.
        name: the GLUE task, or an empty string.
        windows: how long texts are read in windows; None: they are cut, or words have labels.
        coded: whether a language stands before every word of the training rows, as WikiANN's have it: `en:Oslo`.

    Examples:
        >>> task = Task("single-label", ("review",), ("sentiment",), ("negative", "positive"), ("accuracy",))
        >>> splits.task == task
        True
    """

    kind: Kind
    text: tuple[str, ...]
    label: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...]
    name: str = ""
    windows: WindowSettings | None = None
    coded: bool = False

    @property
    def num_labels(self) -> int:
        """Number of columns of the logits."""
        return len(self.label_names)

    @property
    def label_types(self) -> tuple[str, ...]:
        """The types of entities, in the order of the labels; a task of another kind has none."""
        return tag_types(self.label_names) if self.kind == "tokens" else ()

    @property
    def is_pair(self) -> bool:
        """Whether an example is a pair of texts."""
        return len(self.text) == 2

    def auto_weights(self, role: Literal["teacher", "student"] = "student") -> Literal["balanced"] | None:
        """What `class_weights: auto` is: where all classes count alike in the score, they do in training, too.

        Not in a teacher of two classes, whose score fell.
        """
        alike = self.kind == "single-label" and self.metrics[0] in ("macro_f1", "balanced_accuracy")
        return "balanced" if alike and (role == "student" or self.num_labels > 2) else None

    @property
    def id2label(self) -> dict[int, str]:
        """Column of the logits to label name, as in a transformers config."""
        return dict(enumerate(self.label_names))

    @property
    def label2id(self) -> dict[str, int]:
        """Label name to column of the logits, as in a transformers config."""
        return {label: column for column, label in enumerate(self.label_names)}

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; `from_dict` reads it back."""
        # As earlier versions wrote it, for hashes.
        unset = {name for name in ("windows", "coded") if not getattr(self, name)}
        return {"name": self.name} | _STORED.dump_python(self, mode="json", exclude=unset, warnings=False)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Task:
        """Read what `to_dict` wrote; raises a DataError that names the fields that do not fit."""
        try:
            task = _STORED.validate_python(dict(values))
            for metric in task.metrics:
                if not metric.startswith("cost:"):
                    full_metric(metric, task.kind, task.label_names)
        except ValidationError as fault:
            faults = fault.errors(include_url=False, include_input=False)
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in faults)
        except ConfigError as fault:
            told = str(fault)
        else:
            return task
        raise DataError(f"a stored task cannot be read ({told})")


_STORED = TypeAdapter(Task)


def window_settings(data: DataConfig) -> WindowSettings | None:
    """Say how texts are read in windows; None where they are cut."""
    return WindowSettings(data.window_stride, data.window_pool) if data.long_texts == "windows" else None


def with_windows(task: Task, data: DataConfig) -> Task:
    """Read long texts in windows where the config says so, and an example is one text with labels of the whole."""
    windows = window_settings(data)
    if windows is not None and (task.kind == "tokens" or task.is_pair):
        why = (
            f"this task has pairs ({', '.join(task.text)})" if task.is_pair else "tasks of tokens always have their own"
        )
        raise ConfigError(f"data.long_texts: windows are of one text with a label, and {why}; leave it out (cut)")
    return replace(task, windows=windows)


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task: as the Hub has it, and as the benchmark's own files have it."""

    name: GlueName
    folder: str
    text: tuple[str, ...]
    label_names: tuple[str, ...]  # in the Hub's order, which the codes 0, 1 ... of the files follow
    metrics: tuple[str, ...] = ("accuracy",)
    kind: Kind = "single-label"
    file_text: tuple[str, ...] = ()  # in the benchmark's files, where it has other names
    file_label: str = "label"
    files: Mapping[str, str] = field(  # by split; the groups of a split in several files after a slash
        default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv", "test": "test.tsv"}
    )
    headerless: tuple[str, ...] = ()  # columns of training and validation files without a header

    @property
    def task(self) -> Task:
        return Task(self.kind, self.text, ("label",), self.label_names, self.metrics, self.name)


_MNLI_FILES = {
    "train": "train.tsv",
    "validation/matched": "dev_matched.tsv",
    "validation/mismatched": "dev_mismatched.tsv",
    "test/matched": "test_matched.tsv",
    "test/mismatched": "test_mismatched.tsv",
}
_SENTENCES, _PREMISE = ("sentence1", "sentence2"), ("premise", "hypothesis")
_STRINGS, _PARAPHRASE = ("#1 String", "#2 String"), ("not_equivalent", "equivalent")
_ENTAILMENT, _THREE_WAY = ("entailment", "not_entailment"), ("entailment", "neutral", "contradiction")
_COLA_COLUMNS = ("source", "label", "mark", "sentence")
_F1, _DUPLICATE = ("accuracy", "f1"), ("not_duplicate", "duplicate")
_CORRELATIONS = ("pearson", "spearman")

_TABLE = (
    GlueTask("cola", "CoLA", ("sentence",), ("unacceptable", "acceptable"), ("matthews",), headerless=_COLA_COLUMNS),
    GlueTask("sst2", "SST-2", ("sentence",), ("negative", "positive")),
    GlueTask("mrpc", "MRPC", _SENTENCES, _PARAPHRASE, _F1, file_text=_STRINGS, file_label="Quality"),
    GlueTask("stsb", "STS-B", _SENTENCES, ("label",), _CORRELATIONS, "regression", file_label="score"),
    GlueTask("qqp", "QQP", ("question1", "question2"), _DUPLICATE, _F1, file_label="is_duplicate"),
    GlueTask("mnli", "MNLI", _PREMISE, _THREE_WAY, file_text=_SENTENCES, file_label="gold_label", files=_MNLI_FILES),
    GlueTask("qnli", "QNLI", ("question", "sentence"), _ENTAILMENT),
    GlueTask("rte", "RTE", _SENTENCES, _ENTAILMENT),
    GlueTask("wnli", "WNLI", _SENTENCES, ("not_entailment", "entailment")),
    GlueTask("ax", "AX", _PREMISE, _THREE_WAY, ("matthews",), file_text=_SENTENCES),  # without training data
)

GLUE: dict[GlueName, GlueTask] = {entry.name: entry for entry in _TABLE}
"""Every GLUE task by our name; label names and their order are those of `nyu-mll/glue`."""


def fold(name: str) -> str:
    """Give what two spellings of one name share: without case, outer and double spaces, and signs that nobody sees."""
    seen = "".join(sign for sign in unicodedata.normalize("NFC", name) if unicodedata.category(sign) != "Cf")
    return " ".join(seen.split()).casefold()


def match_labels(
    found: Sequence[str], task: Sequence[str], where: str, remedy: str, error: type[KdLoraError] = DataError
) -> list[int]:
    """Say which of the labels found is label j of the task, by name; case and surrounding spaces do not count."""
    places = {fold(name): place for place, name in enumerate(found)}
    wanted = {fold(name): name for name in task}
    have, need = listed(found) or "none", listed(task)
    if len(places) != len(found) or len(wanted) != len(task):
        raise error(f"label names must differ by more than case: {where} has {have}; the task has {need}")
    if places.keys() == wanted.keys():
        return [places[key] for key in wanted]
    message = f"{where} has {len(found)} labels ({have}); the task has {len(task)} ({need})."
    foreign = [name for name in found if fold(name) not in wanted]
    if missing := [name for key, name in wanted.items() if key not in places]:
        hints = [name + did_you_mean(name, foreign) for name in missing[:MOST_LISTED]]
        message += f" Missing: {listed([*hints, *missing[MOST_LISTED:]])}."
    if foreign:
        message += f" Not a label of the task: {listed(foreign)}."
    if found and all(GENERIC_LABEL.fullmatch(name) for name in found):
        message += f" {found[0]} does not say which label it is."
    raise error(f"{message} {remedy}")


def refuse_names(source: str, label: Sequence[str], names: Sequence[str], *, given: bool = True) -> None:
    """Refuse labels that look like one name, and `-`, a mark for none, where it is not given."""
    if not given and "-" in names and "+" not in names:
        raise DataError(
            f"{source}: the label column {label[0]!r} holds '-', by which SNLI and MNLI mark a row without a label; "
            "remove these rows, or, where it is a class, name all classes (task.label_names; kdlora ask: --labels)"
        )
    keys = list(map(fold, names))
    counts = Counter(keys)
    if alike := [name for key, name in sorted(zip(keys, names, strict=True)) if counts[key] > 1]:
        form = ascii if len({unicodedata.normalize("NFC", name) for name in alike}) < len(alike) else repr
        raise DataError(
            f"{source}: the labels {listed(map(form, alike))} ({', '.join(label)}) "
            "differ only in case, in spaces or in how signs are encoded; write each label in one way, in the data and "
            "in task.label_names where that is set"
        )


def find_joined(values: Sequence[str], *, alone: bool = True) -> str | None:
    """Find a value that is several in one: "a;b", where few parts make up many values, or "[0, 1]" among lists.

    One of the parts stands `alone` in a value; else it may stand first in one and last in another, which is a doubt.
    """
    lists = [value for value in values if re.search(r"[,\s]", value.strip())]
    if lists and all(map(_LIST.fullmatch, values)):
        return lists[0]
    for mark in ";|,":
        parts = {value: [part.strip(" []'\"") for part in value.split(mark)] for value in values}
        # No doubt speaks of commas: "low, high" beside "high, low" may be one name each.
        first = {own[0] for own in parts.values() if len(own) == 1 or (mark != "," and not alone)}
        single = first.intersection(own[-1] for own in parts.values())
        joined = [value for value, own in parts.items() if len(own) > 1 and not single.isdisjoint(own)]
        if joined and len({part for own in parts.values() for part in own}) < len(values):
            return joined[0]
    return None


def find_label(name: str, names: Sequence[str], key: str) -> int:
    """Give the column of a label that a config names; case does not count where no name is exactly it."""
    folded = {fold(label): column for column, label in enumerate(names)}
    column = names.index(name) if name in names else folded.get(fold(name))
    if column is None:
        raise ConfigError(f"{key}: {name!r} is no label of the task ({listed(names)}).{did_you_mean(name, names)}")
    return column


def named_weights(task: Task, given: OpenClassWeights | None) -> dict[int, float]:
    """Give the class weights that a config names, by column; `auto` and `balanced` name none."""
    if given not in (None, "auto") and task.kind == "regression":
        raise ConfigError("train.class_weights: a regression has no classes; leave it out")
    if given is None or isinstance(given, str):
        return {}
    return {find_label(name, task.label_names, "train.class_weights"): weight for name, weight in given.items()}


def full_metric(given: str | Mapping[Literal["cost"], Costs], kind: Kind, names: Sequence[str]) -> str:
    """Check that a metric fits the task, and write it as a task keeps it: `NAME`, `NAME:LABEL`, `cost:[[...], ...]`.

    Costs that are not named are 1 for a wrong decision and 0 for the right one; a row is a label, a column a decision.
    """
    if not isinstance(given, str):
        if kind != "single-label":
            raise ConfigError(f"task.metric: cost is of the decisions of a single-label task; this one is {kind}")
        matrix = [[float(row != column) for column in range(len(names))] for row in range(len(names))]
        for label, costs in given["cost"].items():
            for decision, cost in costs.items():
                row, column = (find_label(one, names, "task.metric") for one in (label, decision))
                matrix[row][column] = cost
        if not any(map(any, matrix)):
            raise ConfigError("task.metric: every cost is 0, so that all models are equal; name one that is above 0")
        return f"cost:{json.dumps(matrix)}"
    name, of, label = given.partition(":")
    takes_label = name == "recall" if kind == "tokens" else name in _OF_A_LABEL or _RECALL_AT.fullmatch(name)
    if of and takes_label and kind != "regression":
        labels = tag_types(names) if kind == "tokens" else names
        return f"{name}:{labels[find_label(label, labels, 'task.metric')]}"
    if of or name not in METRICS[kind] or (name == "f1" and len(names) != 2):
        of_labels = {"regression": (), "tokens": ("recall:TYPE",)}
        known = [*METRICS[kind], *of_labels.get(kind, ("f1:LABEL", "average_precision:LABEL", "recall@0.9:LABEL"))]
        better = " r2 ranks models as the mean squared error does." if name in ("mse", "mae") else ""
        raise ConfigError(
            f"task.metric: {given!r} is no metric of a {kind} task with {len(names)} labels; expected one of "
            f"{', '.join(known)}.{better}{did_you_mean(given, known)}"
        )
    return name
