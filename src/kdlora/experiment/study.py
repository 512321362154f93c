"""The study of a search in Optuna's words, and its trials: rows held out, a teacher, a training, each in a process."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kdlora.config import DISTILLED_ARMS, Arm, Config
from kdlora.configfile import build_config
from kdlora.data.augment import keep_unscored
from kdlora.data.load import Splits, add_copies, draw_texts, load_splits
from kdlora.data.spool import label_array
from kdlora.data.tasks import DEFAULT_METRICS
from kdlora.distil.logits import attach_teacher
from kdlora.distil.trainer import ProgressEvent
from kdlora.errors import ArtifactError, ConfigError, DataError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.plan import identity, reset_unused
from kdlora.experiment.recording import hash_base, hash_splits, keep_weights, prepare_process
from kdlora.experiment.settle import (
    Chosen,
    check_table,
    load_base,
    look_at_models,
    rows_per_epoch,
    sample_texts,
    settings_for,
    stored_logits,
)
from kdlora.experiment.stages import hash_teacher, label_splits, train_splits
from kdlora.searchconfig import Choices, Range, SearchConfig
from kdlora.system.integrity import hash_json

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial


_DRAWS = 1000
"""Points drawn at random in search of a new one."""


def open_study(folder: Path, name: str, search: SearchConfig) -> Study:
    """Open a study in the journal of a search's folder; both are created on first use."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class Lock(JournalFileOpenLock):
        def acquire(self) -> bool:
            held = super().acquire()
            try:
                _cut_unfinished_line(folder / "journal.log")
            except BaseException:
                self.release()
                raise
            return held

    journal = str(folder / "journal.log")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            # Optuna's other lock is a link, for which a second process would refuse the folder.
            storage = JournalStorage(JournalFileBackend(journal, Lock(journal)))
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
            raise ArtifactError(
                f"{journal} is damaged ({error!r}); delete it (finished trials stay in trials/ and are not trained "
                "again), or name another folder with --out"
            ) from None
    study.pruner = optuna.pruners.NopPruner()
    lengths = ("train.epochs", *(["train.batch_size"] if search.names_models else []))  # else settled once for all
    if search.pruning and not any(key.endswith(lengths) for key in search.space):
        study.pruner = optuna.pruners.MedianPruner(search.pruning_startup_trials, search.pruning_warmup_epochs + 1)
    return study


def _cut_unfinished_line(journal: Path) -> None:
    """Cut what a full disk left of a line: the next one would be glued to it, and the journal damaged for good."""
    with journal.open("r+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        if file.read() not in (b"", b"\n"):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def ask(study: Study, search: SearchConfig, folder: Path) -> tuple[Trial, FileLock] | None:
    """Take the next trial, at a point that no other has, unless all are done or under way elsewhere.

    A trial whose process died is told as failed, and its point is tried again first. A trial holds a lock as long
    as its process lives, so that the dead can be told from the slow.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "ask.lock"):
        _revive(study, folder)
        grid = grid_of(search)
        counted = counted_trials(study)
        begun = [one for one in counted if one.state.name != "WAITING"]
        if len(begun) >= (search.trials if grid is None else math.prod(map(len, grid.values()))):
            return None
        if len(begun) == len(counted):  # none waits
            tried = [one.params for one in begun]
            for point in _draw(study, search, grid):
                if point not in tried:
                    break
            study.enqueue_trial(point)
        trial = study.ask(distributions(search))
        lock = _lock_of(study, trial.number, folder)
        lock.acquire(timeout=0)
        return trial, lock


def _draw(study: Study, search: SearchConfig, grid: Mapping[str, list[Any]] | None) -> Iterator[dict[str, Any]]:
    """Give the points of a grid, else one that the others suggest, and random ones, since that is often one of them."""
    import optuna
    from optuna.samplers import RandomSampler, TPESampler

    if grid is not None:
        points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
        random.Random(search.seed).shuffle(points)  # an order that does not favour the first key
        yield from points
        return
    # Processes that share a study must not draw the same points; one alone draws the same in every repetition.
    seed = int(hash_json([search.seed, len(study.trials)])[:8], 16)
    first, space = TPESampler(n_startup_trials=search.startup_trials, seed=seed), distributions(search)
    copy = optuna.create_study(sampler=first, direction="maximize")  # in memory
    copy.add_trials(study.trials)
    yield copy.ask(space).params
    copy.sampler = RandomSampler(seed)
    for _ in range(_DRAWS):
        yield copy.ask(space).params


def _lock_of(study: Study, number: int, folder: Path) -> FileLock:
    """Name the lock of a trial; the trials of each study of a folder are numbered from 0."""
    return FileLock(folder / f"running-{study.study_name[-10:]}-{number}.lock")


def counted_trials(study: Study) -> list[FrozenTrial]:
    """List the trials that count: all but those for which another stands in."""
    trials = study.get_trials(deepcopy=False)
    dead = {one.user_attrs.get("continues") for one in trials}
    return [one for one in trials if one.number not in dead]


def _revive(study: Study, folder: Path) -> None:
    """Tell trials whose process died as failed, and let their points be tried again."""
    from optuna.trial import TrialState

    for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        with contextlib.suppress(Timeout), _lock_of(study, one.number, folder).acquire(timeout=0):
            study.tell(one.number, state=TrialState.FAIL)
            study.enqueue_trial(one.params, user_attrs={"continues": one.number})


def retry_failed(study: Study, folder: Path) -> None:
    """Let every trial that failed in an earlier call be tried again."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "ask.lock"):
        for one in counted_trials(study):
            if one.state.name == "FAIL":
                study.enqueue_trial(one.params, user_attrs={"continues": one.number})


def with_settings(config: Config, settings: Mapping[str, Any], *, where: str = "the search") -> Config:
    return build_config(config.model_dump(mode="json"), settings.items(), where=where)


def check_space(config: Config, search: SearchConfig, arm: Arm) -> None:
    """Check that every key exists, that its values, or both ends of a range, fit, and that they change the training."""

    def trained(key: str, value: Any) -> list[Any]:
        """Say what is trained with a value of a key, by the arm and by its teacher."""
        one, found = with_settings(config, {key: value}, where="search.space"), []
        for each in (arm, one.teacher_arm) if arm in DISTILLED_ARMS and not one.given_teacher else (arm,):
            found.append(identity(reset_unused(one, each)))
            found[-1]["student"]["train"] = settings_for(one, each).model_dump(mode="json")
            if one.given_teacher and arm != "lora":  # it is trained no more
                found[-1]["teacher"]["train"] = one.teacher.train.max_length
        return found

    if not search.space:
        raise ConfigError(
            "there is nothing to search: set search.space in the config, or give --space FILE, such as\n"
            "  student.train.learning_rate: {low: 1e-4, high: 5e-3, log: true}\n  lora.rank: [8, 16, 32]"
        )
    faults = []
    for key, one in search.space.items():
        windows = key in ("data.window_pool", "data.window_stride")
        if not windows and key.split(".")[0] not in ("teacher", "student", "lora", "distil"):
            faults.append(
                f"{key}: a search is over keys of teacher, student, lora and distil, and data.window_pool and "
                "data.window_stride; the rest is the same"
            )
            continue
        made, values = [], [*one.values]
        if isinstance(one, Range) and not one.whole and one.low < one.high:  # a key of whole numbers takes its ends
            values.append(min(one.high, one.low + (one.step or 0.382 * (one.high - one.low))))
        for value in values:
            try:
                made.append(trained(key, value))
            except ConfigError as fault:
                faults.append(str(fault).split("\n  - ", 1)[-1])
        differ = any(value != values[0] for value in values)
        if differ and len(made) == len(values) and all(each == made[0] for each in made):
            faults.append(f"{key} changes nothing of the arm {arm}; leave it out, or set search.arm")
    if faults:
        raise ConfigError("\n".join(["search.space:", *(f"  - {fault}" for fault in dict.fromkeys(faults))]))


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, one in search.space.items():
        if isinstance(one, Choices):
            found[key] = CategoricalDistribution([_label(value) for value in one.values])
        elif one.whole:
            found[key] = IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
        else:
            found[key] = FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return found


def settings_of(search: SearchConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    def value_of(space: Range | Choices, point: Any) -> Any:
        return point if isinstance(space, Range) else next(one for one in space.values if _label(one) == point)

    return {key: value_of(search.space[key], point) for key, point in params.items()}


def grid_of(search: SearchConfig) -> dict[str, list[Any]] | None:
    """List every value of every key, where the whole space has no more points than there are trials."""
    grid: dict[str, list[Any]] = {}
    for key, one in search.space.items():
        if isinstance(one, Choices):
            grid[key] = [_label(value) for value in one.values]
        elif step := one.step or (1.0 if one.whole or one.low == one.high else None):
            count = min(int((one.high - one.low) / step + 1e-9), search.trials) + 1  # more than that is no grid
            steps = ((int(step) if one.whole else step) * place for place in range(count))
            grid[key] = [min(one.values[0] + more, one.values[-1]) for more in steps]  # 0.1 + 0.2 is above 0.3
    is_small = len(grid) == len(search.space) and math.prod(map(len, grid.values())) <= search.trials
    return grid if is_small else None


def planned_trials(search: SearchConfig) -> int:
    grid = grid_of(search)
    return search.trials if grid is None else math.prod(map(len, grid.values()))


def _label(value: Any) -> Any:
    """Name a choice by a plain value, as Optuna keeps it."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)


class TrialStoppedError(Exception):
    """A trial was asked to stop: it is pruned."""


class Reporter:
    """Passes the score after each epoch to Optuna, and asks the training to stop where Optuna prunes it."""

    def __init__(self, trial: Trial, stop: Path, tell: Callable[[Any], None]) -> None:
        self._trial, self._stop, self._tell = trial, stop, tell
        self._reported: set[int] = set()

    def hear(self, event: ProgressEvent) -> None:
        """Take an event of the training; within an epoch it has the score of the one before."""
        self._tell(event)
        epoch = math.ceil(event.scored)
        if event.score is not None and event.epoch > epoch + 1e-6 and epoch not in self._reported:
            self.report(epoch, event.score)
            if self._trial.should_prune():
                self._stop.touch()

    def report(self, epoch: int, score: float) -> None:
        """Pass a score on, once."""
        if epoch not in self._reported:
            self._reported.add(epoch)
            self._trial.report(score, epoch)


def load_held_out(config: Config, search: SearchConfig, copies_in: Path | None = None) -> Splits:
    """Load the split that a search sees: part of the training rows is its validation split, and nothing else is."""
    plain = config.data.without_copies  # no copy may be made of a held-out text, or of part of one
    held = hold_out(load_splits(config.task, plain), search)
    return add_copies(held, config.data, keep_in=copies_in)


def hold_out(splits: Splits, search: SearchConfig) -> Splits:
    """Hold rows out of the training split: a text with all its rows, and none of it stays in training."""
    kept, held = draw_texts(splits.task, splits.train, search.validation_fraction, search.seed)
    if not len(held):
        raise DataError("every label has a single training row, so none can be held out; give more rows per label")
    train, validation, unlabelled = splits.train.select(kept), splits.train.select(held), splits.unlabelled
    if splits.task.kind in ("multi-label", "tokens") and not (label_array(validation) > 0).any():
        raise DataError(
            "no held-out row has a label or an entity, so that a score on them cannot show what a trial has learnt; "
            "raise search.validation_fraction"
        )
    if unlabelled is not None:
        unlabelled = keep_unscored(unlabelled, [validation])
    return dataclasses.replace(
        splits, train=train, validation=validation, test=None, unlabelled=unlabelled, held_out=len(held)
    )


def inspect_rows(config: Config, search: SearchConfig, named: bool = True) -> tuple[str, Chosen]:
    """Fingerprint a search's rows, `named` with its given teacher; say what data and models decide of open keys."""
    splits = load_held_out(config, search)
    check_table(config, splits)
    rows, task = hash_splits(splits), splits.task
    if not task.name and task.metrics != DEFAULT_METRICS[task.kind]:
        rows = hash_json([rows, task.metrics])  # trials by another metric are another study
    if named and config.given_teacher and set(config.run.arms) & DISTILLED_ARMS:  # so are those by another teacher
        tables = stored_logits(config, None, splits) if config.teacher.is_table else []
        rows = hash_json([rows, [one.fingerprint for one in tables] or hash_teacher(config, task)])
    if named:  # and by another pretrained model, in the same folder
        taught = bool(set(config.run.arms) & DISTILLED_ARMS) and not config.given_teacher
        arms = sorted({*config.run.arms, *([config.teacher_arm] if taught else [])})
        rows = hash_json([rows, [hash_base(load_base(config, arm, 0, task)) for arm in arms]])
    looks = look_at_models(config, task, sample_texts(splits.train), timed=False)
    train = len(splits.train) + splits.held_out
    return rows, Chosen(looks, {"train": train, "unlabelled": rows_per_epoch(splits) - train}, task)


def make_teacher(config: Config, search: SearchConfig, layout: ExperimentLayout, send: Callable[..., None]) -> None:
    """Train a teacher without the held-out rows, unless it was given, and store what it says of the others."""
    prepare_process(config)
    splits, seed = load_held_out(config, search, layout.copies), config.teacher_seed
    if not config.given_teacher and not layout.teacher.exists():
        encoder = load_base(config, config.teacher_arm, seed, splits.task)
        trained = train_splits(config, layout, splits, encoder, config.teacher_arm, seed, send)
        keep_weights(config, layout, trained, config.teacher_arm, seed)
    label_splits(config, layout, splits, send)


def train_trial(
    config: Config, search: SearchConfig, layout: ExperimentLayout, arm: Arm, stop: Path, send: Callable[[Any], None]
) -> tuple[float | None, list[dict[str, Any]]]:
    """Train one arm as a trial's config says; score what the recipe selects, and every epoch, on the held-out rows."""
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
        return None, []
    history = trained.outcome.history
    chosen = next(entry for entry in history if float(entry["epoch"]) == trained.outcome.best_epoch)
    return float(chosen["score"]), history
