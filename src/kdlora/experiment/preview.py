"""What an experiment is about to do, and on what: counted and timed before anything trains."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from datasets import Dataset

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.spool import hash_texts, label_array, read_column, slice_rows, text_columns
from kdlora.data.tasks import Task, window_settings
from kdlora.data.windows import tokens_read
from kdlora.distil.words import MOST_ROWS
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.engines import gpus_for
from kdlora.experiment.plan import plan_runs
from kdlora.experiment.recording import count_rows, splits_by_name
from kdlora.experiment.settle import (
    Chosen,
    Looks,
    ModelLook,
    closed,
    labels_unlabelled,
    look_at_models,
    sample_texts,
    settings_for,
)
from kdlora.report.wording import metric_title, of_label, tell_unknown
from kdlora.system.children import run_in_child
from kdlora.system.ownership import read_manifest

FULL, ADAPTERS = 4.0, 3.6
"""What training on a row costs in forward passes: 4.1 and 3.7 of MiniLM of six layers, bf16, one core."""
RUN_SECONDS, DEPLOY_SECONDS, WORDS_SECONDS = 5.0, 30.0, 0.002
"""Of a run beside its training; of export and benchmark of what ships; of a bag of words, a row of 50 tokens."""
_SHOWN_LABELS = 6
_FEW_TO_CHOOSE = 5
"""Validation rows of a label below which the scores of arms are told to rest on few."""
_MIX = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a hash is lost


@dataclass(frozen=True)
class TextLengths:
    """How one model reads the training texts, in tokens."""

    median: float
    most_within: int  # holds 99% of the texts
    max_length: int  # where texts are cut
    cut: float  # share of the texts that are longer, 0 to 1
    unknown: float  # share of the tokens that the tokenizer cannot read, 0 to 1


@dataclass(frozen=True)
class PlannedTraining:
    """The trainings of one arm that are left."""

    arm: Arm
    runs: int  # one a seed
    steps: int  # optimiser steps of each; 0 of `words`, which has none
    seconds: float  # of each, estimated


@dataclass(frozen=True)
class ExperimentPlan:
    """What an experiment is about to do, and on what."""

    config: Config = field(repr=False)  # what was open is chosen
    task: Task
    rows: dict[str, int]  # per split, and of perturbed copies
    labels: dict[str, int]  # training rows per label, or entities per type; empty for a regression
    validation_labels: dict[str, int]  # the same of the validation rows, which choose what ships
    lengths: dict[str, TextLengths]  # for `teacher` and `student`, where such a model is used
    duplicates: dict[str, int]  # texts that were there before: in a split, across two, in training with another class
    trainings: tuple[PlannedTraining, ...]  # what is left, in its order
    hours: float  # all of it, an estimate from a few forward passes on this machine
    notes: tuple[str, ...] = ()  # what was inferred, dropped or drawn, in plain sentences
    gpus: int = 0  # that get a run each at the same time

    @property
    def steps(self) -> int:
        return sum(one.runs * one.steps for one in self.trainings)

    def to_dict(self) -> dict[str, Any]:
        facts = asdict(self)
        del facts["config"]
        return facts | {"task": self.task.to_dict(), "steps": self.steps}

    def lines(self) -> list[tuple[str, str]]:
        """Give the facts for people: a word, and what there is to say."""
        names = {"copies": "perturbed copies of training texts"}
        task = self.task
        metrics = " and ".join(metric_title(of_label(name, task)) for name in task.metrics)
        if self.config.task.metric is None and not task.name and task.metrics == ("macro_f1",):
            metrics += ", because the classes are uneven (task.metric)"
        balanced = "balanced" in (self.config.teacher.train.class_weights, self.config.student.train.class_weights)
        is_cut = any(one.cut for one in self.lengths.values())
        is_cut &= not (task.kind == "tokens" or task.windows or task.is_pair)
        twice = [f"{number:,} in {name}" for name, number in self.duplicates.items() if number]
        trainings = [
            f"{one.arm} {f'{one.runs} × {one.steps:,} steps' if one.steps else f'in about {one.seconds:.0f} seconds'}"
            for one in self.trainings
        ]
        time = f"{max(2, round(60 * self.hours))} minutes" if self.hours < 1.5 else f"{self.hours:.1f} hours"
        more = f"; less on {self.gpus} GPUs, each of which gets a run" if self.gpus else ""
        told = {
            "rows": ", ".join(f"{number:,} {names.get(name, name)}" for name, number in self.rows.items()),
            "task": f"{task.kind}, {' + '.join(task.text)} to {', '.join(task.label)}; scored by {metrics}",
            "labels": self._labels(),
            "weights": "rare classes count for more in training (class_weights)" if balanced else "",
            "tokens": self._of_each_model(
                lambda one: f"median {one.median:g}, 99% of the training texts within {one.most_within}"
            ),
            "unknown": tell_unknown({name: one.unknown for name, one in self.lengths.items()}),
            "max_length": self._of_each_model(self._longest)
            + ("; data.long_texts: windows reads all of them" if is_cut else ""),
            "duplicates": ", ".join(twice) or "no text occurs twice",
            "trainings": ", ".join(trainings),
            "steps": f"{self.steps:,} in all" if self.steps else "",
            "time": f"about {time}, estimated from a few forward passes on this machine{more}"
            if self.trainings
            else "no training is left",
        }
        return [(name, text) for name, text in told.items() if text or name == "trainings"]

    def _longest(self, one: TextLengths) -> str:
        if not one.cut:
            return f"{one.max_length} tokens; no training text is longer"
        done = "read in windows" if self.task.kind == "tokens" or self.task.windows else "cut"
        return f"{one.max_length} tokens; {one.cut:.1%} of the training texts are longer and are {done}"

    def _labels(self) -> str:
        ordered = [f"{name} {number:,}" for name, number in sorted(self.labels.items(), key=lambda item: -item[1])]
        if not ordered:
            return ""
        name, number = min(self.validation_labels.items(), key=lambda item: item[1])
        some = f"only {number}" if number else "none"
        few = f"; {some} of {name!r} in validation, which chooses what ships" if number < _FEW_TO_CHOOSE else ""
        if len(ordered) > _SHOWN_LABELS:
            return f"{len(ordered)}; most rows: {', '.join(ordered[:3])}; fewest: {', '.join(ordered[-3:])}{few}"
        what = "entities in the training rows" if self.task.kind == "tokens" else "training rows"
        return f"{len(ordered)}: {', '.join(ordered)} {what}{few}"

    def _of_each_model(self, tell: Callable[[TextLengths], str]) -> str:
        """Tell one fact of all models, once where it is the same for all."""
        texts = {name: tell(one) for name, one in self.lengths.items()}
        if len(set(texts.values())) == 1:
            return next(iter(texts.values()))
        return "; ".join(f"{name}: {text}" for name, text in texts.items())


def make_plan(
    config: Config, layout: ExperimentLayout, splits: Splits, finished: Container[str], processes: int
) -> ExperimentPlan:
    """Settle what the config leaves open, by data and models, and estimate the runs that are left."""
    looks = run_in_child(look_at_models, config, splits.task, sample_texts(splits.train))
    left = [run.arm for run in plan_runs(config) if run.key not in finished]
    seeds = Counter(arm for arm in left if arm != "fft" or not config.given_teacher)
    rows = count_rows(splits)
    if looks:
        is_open = (read_manifest(layout.root) or {}).get("open", {}).get("student.train.learning_rate", False) is None
        config = Chosen(looks, rows, splits.task, processes).fill_in(config, follows=False if is_open else None)
    trainings = []
    for arm, runs in seeds.items():
        steps, settings = 0, settings_for(config, arm)
        if arm != "words":
            of_epoch = math.ceil(_drawn(config, arm, rows) / (settings.batch_size * processes))
            steps = math.ceil(closed(settings).epochs * of_epoch)
        one = RUN_SECONDS + training_seconds(config, arm, rows, looks, processes)
        trainings.append(PlannedTraining(arm, runs, steps, one))
    seconds = sum(one.runs * one.seconds for one in trainings) + (DEPLOY_SECONDS if config.export.benchmark else 0.0)
    if not layout.teacher_logits.exists() and set(seeds) & DISTILLED_ARMS and "teacher" in looks:
        more = rows.get("unlabelled", 0) + rows.get("copies", 0)
        read = rows["train"] + (more if labels_unlabelled(config) else 0)
        seconds += read * _row_seconds(config, looks, config.teacher_arm) / processes
    notes, scored = splits.notes, splits_by_name(splits, scored=True)
    if "student" in looks and looks["student"].decodes and config.export.formats:
        notes += (
            "The student is a decoder, and only encoders are exported: it will predict by PyTorch, without an ONNX or "
            "int8 file (export.formats). For these choose an encoder as student.model.",
        )
    return ExperimentPlan(
        config,
        splits.task,
        rows,
        count_labels(splits.task, splits.train),
        count_labels(splits.task, splits.validation),
        {role: _text_lengths(one, getattr(config, role).train.max_length) for role, one in looks.items()},
        count_duplicates({"train": splits.train} | scored),
        tuple(trainings),
        seconds / 3600,
        notes,
        len(gpus_for(config, processes)),
    )


def training_seconds(config: Config, arm: Arm, rows: Mapping[str, int], looks: Looks, processes: int = 1) -> float:
    """Estimate how long a training takes, from forward passes that were timed; `rows` by split, with the copies."""
    if arm == "words":
        longer = max([1.0, *(float(one.lengths.mean()) / 50 for one in looks.values())])
        return WORDS_SECONDS * min(rows["train"], MOST_ROWS) * longer
    settings = closed(settings_for(config, arm))
    epochs, scores = settings.epochs, settings.epochs / settings.scored_every("single-label")  # `select` is settled
    scored = (scores / processes + 1) * rows.get("validation", 0) + rows.get("test", 0)
    copied = 2 if rows.get("copies") and arm in DISTILLED_ARMS else 1  # a copy beside every row
    passes = (ADAPTERS if arm in LORA_ARMS else FULL) * epochs * _drawn(config, arm, rows) * copied / processes + scored
    return passes * _row_seconds(config, looks, arm)


def _drawn(config: Config, arm: Arm, rows: Mapping[str, int]) -> int:
    """Count the rows that an epoch draws, as `rows_per_epoch` does."""
    return rows["train"] + (0 if arm in ("fft", config.teacher_arm) else rows.get("unlabelled", 0))


def _row_seconds(config: Config, looks: Looks, arm: Arm) -> float:
    """Give the seconds of a forward pass over a training text of mean length."""
    look = looks["teacher" if arm in TEACHER_ARMS else "student"]
    max_length = settings_for(config, arm).max_length or look.limit
    return look.seconds * float(tokens_read(look.lengths, max_length, window_settings(config.data)).mean())


def _text_lengths(look: ModelLook, max_length: int | None) -> TextLengths:
    counts, limit = look.lengths, min(max_length or look.limit, look.limit)
    within = int(np.quantile(counts, 0.99, method="inverted_cdf"))
    return TextLengths(float(np.median(counts)), within, limit, float((counts > limit).mean()), look.unknown)


def count_labels(task: Task, rows: Dataset) -> dict[str, int]:
    """Count the rows of each label, or the entities of each type; nothing for a regression."""
    if task.kind == "regression":
        return {}
    labels = label_array(rows)
    if task.kind == "tokens":
        first = np.bincount(labels[labels > 0], minlength=task.num_labels)[1::2]  # B-, which every entity has once
        return dict(zip(task.label_types, first.tolist(), strict=True))
    counts = labels.sum(0) if task.kind == "multi-label" else np.bincount(labels, minlength=task.num_labels)
    return {name: int(number) for name, number in zip(task.label_names, counts, strict=True)}


def count_duplicates(parts: Mapping[str, Dataset]) -> dict[str, int]:
    """Count the rows whose texts were there before, in their split, an earlier one, or training with another class."""
    keys = {name: _text_keys(rows) for name, rows in parts.items()}
    unique = {name: np.unique(hashes) for name, hashes in keys.items()}
    found = {name: len(keys[name]) - len(unique[name]) for name in parts}
    for first, second in itertools.combinations(parts, 2):
        found[f"{first} and {second}"] = int(np.isin(keys[second], unique[first]).sum())
    classes = read_column(parts["train"], "label")
    if pa.types.is_integer(classes.type):
        told = pa.table({"text": keys["train"], "class": classes}).group_by(["text", "class"]).aggregate([])
        found["train with another label"] = told.num_rows - len(unique["train"])
    return found


def _text_keys(rows: Dataset) -> npt.NDArray[np.uint64]:
    """Give a hash of each row's text, or of its pair, whose order counts."""
    keys = np.zeros(len(rows), np.uint64)
    for name in text_columns(rows):
        keys = keys * _MIX + hash_texts(part.column(0).combine_chunks() for part in slice_rows(rows, [name]))
    return keys
