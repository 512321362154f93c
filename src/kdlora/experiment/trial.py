"""One trial of a search, in a process of its own: rows held out of the training split, a teacher, a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlora.config import DISTILLED_ARMS, Arm, Config
from kdlora.data.augment import keep_unscored
from kdlora.data.load import Splits, add_copies, load_splits, split_rows
from kdlora.data.spool import read_column, read_texts
from kdlora.data.tasks import DEFAULT_METRICS
from kdlora.distil.logits import attach_teacher
from kdlora.distil.trainer import ProgressEvent
from kdlora.errors import DataError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.inputs import load_base, stored_logits
from kdlora.experiment.recording import hash_splits, prepare_process
from kdlora.experiment.settle import Chosen, choose
from kdlora.experiment.shipping import keep_weights
from kdlora.experiment.stages import label_splits, train_splits
from kdlora.searchconfig import SearchConfig
from kdlora.system.integrity import hash_json


class TrialStoppedError(Exception):
    """A trial was asked to stop: it is pruned."""


@dataclass(frozen=True)
class TrialResult:
    """The score on the held-out rows of the weights that the recipe selects (None: stopped), and those by epoch."""

    score: float | None
    history: list[dict[str, Any]]


def load_held_out(config: Config, search: SearchConfig, copies_in: Path | None = None) -> Splits:
    """Load the split that a search sees: part of the training rows is its validation split, and nothing else is."""
    plain = config.data.model_copy(update={"augment": 0})  # no copy may be made of a held-out text, or of part of one
    held = hold_out(load_splits(config.task, plain), search)
    return add_copies(held, config.data.augment, seed=config.data.split_seed, keep_in=copies_in)


def hold_out(splits: Splits, search: SearchConfig) -> Splits:
    """Hold rows out of the training split: a text with all its rows, and none of it stays in training."""
    texts = pd.DataFrame(read_texts(splits.train))
    number = texts.groupby(list(texts), sort=False).ngroup().to_numpy()  # of each row's text, in their order
    first = np.flatnonzero(~texts.duplicated())
    classes = read_column(splits.train, "label").to_numpy()[first] if splits.task.kind == "single-label" else None
    if len(first) < 2:
        raise DataError(f"{len(first)} training text cannot be split for a search; give more rows")
    _, drawn = split_rows(len(first), search.validation_fraction, search.seed, classes)
    if not len(drawn):
        raise DataError("every label has a single training row, so none can be held out; give more rows per label")
    is_held = np.isin(number, drawn)
    train = splits.train.select(np.flatnonzero(~is_held))
    validation, unlabelled = splits.train.select(np.flatnonzero(is_held)), splits.unlabelled
    if unlabelled is not None:
        unlabelled = keep_unscored(unlabelled, [validation])
    return dataclasses.replace(
        splits, train=train, validation=validation, test=None, unlabelled=unlabelled, held_out=int(is_held.sum())
    )


def inspect_rows(config: Config, search: SearchConfig) -> tuple[str, Chosen]:
    """Fingerprint the rows that a search uses, and say what data and models decide where the config does not."""
    splits = load_held_out(config, search)
    rows, task = hash_splits(splits), splits.task
    if not task.name and task.metrics != DEFAULT_METRICS[task.kind]:
        rows = hash_json([rows, task.metrics])  # trials by another metric are another study
    return rows, choose(config, splits)


def make_teacher(config: Config, search: SearchConfig, layout: ExperimentLayout, send: Callable[..., None]) -> None:
    """Train a teacher without the held-out rows, unless it was given, and store what it says of the others."""
    prepare_process(config)
    splits, seed = load_held_out(config, search, layout.copies), config.teacher_seed
    if not config.given_teacher and not layout.teacher.exists():
        encoder = load_base(config, config.teacher_arm, seed, splits.task)
        trained = train_splits(config, layout, splits, encoder, config.teacher_arm, seed, send)
        keep_weights(config, layout, splits.task, trained, config.teacher_arm, seed)
    label_splits(config, layout, splits, send)


def train_trial(
    config: Config, search: SearchConfig, layout: ExperimentLayout, arm: Arm, stop: Path, send: Callable[[Any], None]
) -> TrialResult:
    """Train one arm as a trial's config says, and score it on the held-out rows after every epoch."""
    prepare_process(config)
    splits, seed = load_held_out(config, search, layout.copies), config.run.seeds[0]
    if arm in DISTILLED_ARMS:
        splits = attach_teacher(splits, *stored_logits(config, layout, splits), distil=config.distil)

    def watch(event: ProgressEvent) -> None:
        if stop.exists():
            raise TrialStoppedError
        send(event)

    encoder = load_base(config, arm, seed, splits.task)
    try:
        trained = train_splits(config, layout, splits, encoder, arm, seed, watch)
    except TrialStoppedError:
        return TrialResult(None, [])
    history = trained.outcome.history
    chosen = next(entry for entry in history if float(entry["epoch"]) == trained.outcome.best_epoch)
    return TrialResult(float(chosen["score"]), history)
