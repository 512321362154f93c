"""One trial of a search, in a process of its own: rows held out of the training split, a teacher, a training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlora.config import DISTILLED_ARMS, Arm, Config
from kdlora.data.load import Splits, add_copies, load_splits
from kdlora.data.rows import read_column
from kdlora.data.split import split_rows
from kdlora.data.unlabelled import keep_unscored
from kdlora.distil.session import ProgressEvent
from kdlora.errors import DataError
from kdlora.evidence.records import ExperimentLayout, atomic_folder
from kdlora.experiment.recording import hash_splits, prepare_process
from kdlora.experiment.sources import load_base, stored_logits, stored_unlabelled_logits
from kdlora.experiment.stages import label_splits, train_splits
from kdlora.models.encoders import save_encoder


class TrialStoppedError(Exception):
    """A trial was asked to stop: it is pruned."""


@dataclass(frozen=True)
class Holdout:
    """How rows are held out of the training split.

    Attributes:
        fraction: share of the training rows.
        seed: of the draw.
    """

    fraction: float
    seed: int


@dataclass(frozen=True)
class TrialResult:
    """What a trial found.

    Attributes:
        score: of the weights that the recipe selects, on the held-out rows, 0 to 100; None where it was stopped.
        history: per epoch, as in a run's record.
    """

    score: float | None
    history: list[dict[str, Any]]


def load_held_out(config: Config, holdout: Holdout) -> Splits:
    """Load the split that a search sees: part of the training rows is its validation split, and nothing else is.

    Args:
        config: of the search; its validation and test rows are left out.
        holdout: share and seed.

    Raises:
        DataError: too few training rows.
    """
    copies = config.data.augment
    data = config.data.model_copy(update={"augment": 0})  # no copy of a held-out text may be learnt from
    held = hold_out(load_splits(config.task, data), holdout)
    return add_copies(held, copies, seed=data.split_seed) if copies else held


def hold_out(splits: Splits, holdout: Holdout) -> Splits:
    """Hold rows out of the training split.

    Args:
        splits: as the config names them; validation and test rows are left out.
        holdout: share and seed.

    Raises:
        DataError: too few training rows.
    """
    classes = read_column(splits.train, "label").to_numpy() if splits.task.kind == "single-label" else None
    if len(splits.train) < 2:
        raise DataError(f"{len(splits.train)} training row cannot be split for a search; give more rows")
    kept, drawn = split_rows(len(splits.train), holdout.fraction, holdout.seed, classes)
    if not len(drawn):
        raise DataError("every label has a single training row, so none can be held out; give more rows per label")
    train, validation, unlabelled = splits.train.select(kept), splits.train.select(drawn), splits.unlabelled
    if unlabelled is not None:
        unlabelled = keep_unscored(unlabelled, [validation])
    return dataclasses.replace(splits, train=train, validation=validation, test=None, unlabelled=unlabelled)


def inspect_rows(config: Config, holdout: Holdout) -> str:
    """Fingerprint the rows that a search uses.

    Args:
        config: of the search.
        holdout: share and seed.

    Raises:
        DataError: the data are missing or do not fit.
    """
    return hash_splits(load_held_out(config, holdout))


def make_teacher(config: Config, holdout: Holdout, layout: ExperimentLayout, send: Callable[..., None]) -> None:
    """Train a teacher without the held-out rows, unless it was given, and store what it says of the others.

    Args:
        config: of the search; `fft` is what teaches.
        holdout: share and seed.
        layout: where teacher and logits go.
        send: called with each event.
    """
    prepare_process(config)
    splits, seed = load_held_out(config, holdout), config.teacher_seed
    if not config.given_teacher and not layout.teacher.exists():
        encoder = load_base(config, "fft", seed, splits.task)
        trained = train_splits(config, layout, splits, encoder, "fft", seed, None, None, send)
        trained.encoder.model.config.kdlora_task = splits.task.to_dict()
        with atomic_folder(layout.teacher) as folder:
            save_encoder(trained.encoder, folder)
    label_splits(config, layout, splits, send)


def train_trial(
    config: Config, holdout: Holdout, layout: ExperimentLayout, arm: Arm, stop: Path, send: Callable[[Any], None]
) -> TrialResult:
    """Train one arm as a trial's config says, and score it on the held-out rows after every epoch.

    Args:
        config: with the trial's settings.
        holdout: share and seed.
        layout: its teacher is that of the trial; checkpoints go to the run's folder.
        arm: the arm.
        stop: a file whose presence asks the training to stop.
        send: called with each training event.
    """
    prepare_process(config)
    splits, seed = load_held_out(config, holdout), config.run.seeds[0]
    teacher = stored_logits(config, layout, splits.task) if arm in DISTILLED_ARMS else None
    unlabelled = stored_unlabelled_logits(config, layout, splits) if arm in DISTILLED_ARMS else None

    def watch(event: ProgressEvent) -> None:
        if stop.exists():
            raise TrialStoppedError
        send(event)

    encoder = load_base(config, arm, seed, splits.task)
    try:
        trained = train_splits(config, layout, splits, encoder, arm, seed, teacher, unlabelled, watch)
    except TrialStoppedError:
        return TrialResult(None, [])
    history = trained.outcome.history
    chosen = next(entry for entry in history if float(entry["epoch"]) == trained.outcome.best_epoch)
    return TrialResult(float(chosen["score"]), history)
