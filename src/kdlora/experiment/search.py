"""A search over fields of a config: trials on held-out training rows, pruned by epoch, shared by processes."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from kdlora.config import DISTILLED_ARMS, STUDENT_ARMS, Arm, Config
from kdlora.configfile import save_config
from kdlora.distil.session import ProgressEvent
from kdlora.errors import ArtifactError, KdLoraError
from kdlora.experiment.plan import ConfigurationLayout, identity, reset_unused
from kdlora.experiment.search_report import write_search_report
from kdlora.experiment.study import (
    ask,
    check_space,
    open_study,
    require_optuna,
    settings_of,
    storage_faults,
    study_name,
    with_settings,
)
from kdlora.experiment.trial import Holdout, TrialResult, inspect_rows, make_teacher, train_trial
from kdlora.searchconfig import SearchConfig
from kdlora.system.children import run_in_child
from kdlora.system.integrity import hash_json
from kdlora.system.ownership import check_folder, claim_folder, remove
from kdlora.system.storage import write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from optuna import Study, Trial

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Search:
    """A search that is under way.

    Attributes:
        given: the config as it was given.
        config: the same with the one arm that is trained.
        settings: space and judgement.
        arm: that arm.
        folder: where everything goes.
        storage: as the user named it.
        name: of the study.
        rows: fingerprint of the rows that are used.
    """

    given: Config
    config: Config
    settings: SearchConfig
    arm: Arm
    folder: Path
    storage: str
    name: str
    rows: str

    @property
    def holdout(self) -> Holdout:
        """How rows are held out of the training split."""
        return Holdout(self.settings.validation_fraction, self.settings.seed)


@dataclass(frozen=True)
class SearchEvent:
    """Where a search stands.

    Attributes:
        done: trials that have ended.
        trials: trials in all.
        best: the best score so far; None before the first.
        number: of the trial that this is about.
        detail: a training's progress, or a sentence on how the trial ended.
    """

    done: int
    trials: int
    best: float | None
    number: int
    detail: Any


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        folder: of the search.
        best: config key to value of the best trial; empty where no trial finished.
        score: its score on the held-out rows.
        finished: trials that were trained to the end.
        pruned: trials that were stopped.
        failed: trials that failed.
        paths: the best config and the report.
    """

    folder: Path
    best: dict[str, Any]
    score: float | None
    finished: int
    pruned: int
    failed: int
    paths: tuple[Path, ...] = field(default=())


SearchListener = Callable[[SearchEvent], None]


def run_search(
    config: Config,
    settings: SearchConfig,
    out: str | Path | None = None,
    *,
    storage: str | None = None,
    on: str | None = None,
    listen: SearchListener | None = None,
) -> SearchResult:
    """Search fields of a config for the best score on held-out training rows.

    The config's own validation and test rows are never scored, so that what is reported of the best config stays
    clean: `kdlora run OUT/best.yaml` trains on all training rows. The same call again goes on; several processes
    with the same storage and folder share the trials.

    Args:
        config: the base.
        settings: space, number of trials, pruning.
        out: folder; default `runs/<name>-search`.
        storage: a journal file, a SQLite file, or a database URL; default: a journal in the folder.
        on: `ray` or `ray://HOST:PORT`: the cluster that carries the trials out; default: this process.
        listen: called with each event.

    Raises:
        KdLoraError: if the space, the data or the models do not fit, or the storage cannot be used.
    """
    search = begin_search(config, settings, out, storage)
    with storage_faults(search.storage):
        if on is None:
            work_on(search, listen)
        else:
            from kdlora.experiment.ray_search import search_on_ray

            search_on_ray(search, on, lambda: _tell_of_last(search, listen))
        return end_search(search)


def begin_search(config: Config, settings: SearchConfig, out: str | Path | None, storage: str | None) -> Search:
    """Check a search, and make its folder and storage."""
    require_optuna()
    check_space(config, settings)
    students: list[Arm] = [arm for arm in STUDENT_ARMS if arm in config.run.arms]
    arm = settings.arm or (students[0] if students else "fft")
    given, config = config, with_settings(config, {"run.arms": [arm]})
    folder = (Path(out) if out is not None else Path("runs") / f"{config.title()}-search").absolute()
    check_folder(folder, "search")
    rows, chosen = run_in_child(inspect_rows, config, Holdout(settings.validation_fraction, settings.seed))
    given, config = chosen.fill_in(given), chosen.fill_in(config)
    name = study_name(config, settings, rows)
    search = Search(given, config, settings, arm, folder, storage or str(folder / "journal.log"), name, rows)
    claim_folder(folder, "search")
    open_study(search.storage, name, settings)
    write_text_atomic(folder / "search.yaml", save_config(config))
    return search


def work_on(search: Search, listen: SearchListener | None = None, *, most: int | None = None) -> int:
    """Carry out trials until all are done or under way elsewhere."""
    study = open_study(search.storage, search.name, search.settings)
    done = 0
    while most is None or done < most:
        taken = ask(study, search.settings, search.folder / "trials")
        if taken is None:
            break
        trial, lock = taken
        try:
            _carry_out(search, study, trial, listen)
        finally:
            lock.release()
        done += 1
    return done


def _carry_out(search: Search, study: Study, trial: Trial, listen: SearchListener | None) -> None:
    """Carry out one trial; a config that cannot be trained is a failed trial, not the end of the search."""
    from optuna.trial import TrialState

    settings = settings_of(search.settings, trial.params)
    trial.set_user_attr("settings", settings)
    try:
        config = with_settings(search.config, settings)
        result = _result(search, study, trial, config, listen)
    except OSError:
        raise
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
        logger.error("trial %d failed: %s", trial.number, fault, exc_info=not isinstance(error, KdLoraError))
        trial.set_user_attr("error", fault)
        study.tell(trial, state=TrialState.FAIL)
        _tell(study, search, trial, f"failed: {fault}", listen)
        return
    if result.score is None:
        study.tell(trial, state=TrialState.PRUNED)
        _tell(study, search, trial, "pruned", listen)
    else:
        study.tell(trial, result.score)
        _tell(study, search, trial, f"score {result.score:.2f}", listen)


def _result(search: Search, study: Study, trial: Trial, config: Config, listen: SearchListener | None) -> TrialResult:
    """Train a trial's config, unless another trial has trained the very same before."""
    key = _key(search, config, search.arm)
    folder = search.folder / "trials" / key
    trial.set_user_attr("folder", f"trials/{key}")
    folder.mkdir(parents=True, exist_ok=True)
    stop = folder / "stop"
    with FileLock(folder / ".lock"):
        known = _read_result(folder / "trial.json")
        if known is not None:
            _Reporter(trial, stop, _ignore).complete(known.history)
            return known
        remove(stop)
        layout = ConfigurationLayout(folder, shared_folder=search.folder)
        if search.arm in DISTILLED_ARMS and not config.teacher.is_table:
            layout = replace(layout, shared_teacher=_teacher(search, config, listen, trial, study))
        reporter = _Reporter(trial, stop, lambda event: _tell(study, search, trial, event, listen))
        arguments = (config, search.holdout, layout, search.arm, stop)
        try:
            result = run_in_child(train_trial, *arguments, on_message=reporter.hear)
        except ArtifactError as error:
            logger.info("trial %d starts afresh: %s", trial.number, error)  # checkpoints of an earlier version
            remove(folder / "runs")
            result = run_in_child(train_trial, *arguments, on_message=reporter.hear)
        remove(folder / "runs")
        remove(stop)
        reporter.complete(result.history)
        if result.score is not None:
            settings = settings_of(search.settings, trial.params)
            write_json_atomic(
                folder / "trial.json", {"settings": settings, "score": result.score, "history": result.history}
            )
        return result


def _read_result(path: Path) -> TrialResult | None:
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return TrialResult(content["score"], content["history"])


class _Reporter:
    """Passes the score after each epoch to Optuna, and asks the training to stop where Optuna prunes it."""

    def __init__(self, trial: Trial, stop: Path, tell: Callable[[Any], None]) -> None:
        self._trial, self._stop, self._tell = trial, stop, tell
        self._ended: tuple[int, float] | None = None
        self._reported: set[int] = set()

    def hear(self, event: Any) -> None:
        """Take an event of the training.

        An event at the very end of an epoch may come before its evaluation or after it; the last one counts, so a
        score is passed on with the first event of the next epoch.
        """
        if not isinstance(event, ProgressEvent):
            return
        self._tell(event)
        if self._ended is not None and event.epoch > self._ended[0] + 1e-6:
            epoch, score = self._ended
            self._ended = None
            self._report(epoch, score)
            if self._trial.should_prune():
                self._stop.touch()
        if event.score is not None and event.epoch > 0.5 and abs(event.epoch - round(event.epoch)) < 1e-6:
            self._ended = (round(event.epoch), event.score)

    def complete(self, history: list[dict[str, Any]]) -> None:
        """Pass on the scores of the epochs that no event told of, those before an interruption among them."""
        for epoch, entry in enumerate(history, start=1):
            self._report(epoch, float(entry["score"]))

    def _report(self, epoch: int, score: float) -> None:
        if epoch not in self._reported:
            self._reported.add(epoch)
            self._trial.report(score, epoch)


def _teacher(search: Search, config: Config, listen: SearchListener | None, trial: Trial, study: Study) -> Path:
    """Give the teacher of a trial, made once for all trials with the same `teacher` section."""
    key = _key(search, config, "fft")
    layout = ConfigurationLayout(search.folder / "teachers" / key, shared_folder=search.folder)
    layout.root.mkdir(parents=True, exist_ok=True)
    with FileLock(layout.root / ".lock"):  # another process that needs it waits
        if not (layout.root / "done").exists():
            hear = None if listen is None else lambda event: _tell(study, search, trial, event, listen)
            fft = reset_unused(config, "fft")
            run_in_child(make_teacher, fft, search.holdout, layout, on_message=hear or _ignore)
            write_text_atomic(layout.root / "done", key)
    return layout.teacher


def _key(search: Search, config: Config, arm: Arm) -> str:
    """Hash what decides a training's figures."""
    values: dict[str, Any] = identity(reset_unused(config, arm)) | {"arm": arm, "rows": search.rows}
    values["seed"] = config.teacher_seed if arm == "fft" else config.run.seeds[0]
    return hash_json(values)[:12]


def _tell_of_last(search: Search, listen: SearchListener | None) -> None:
    """Say how the newest trial that ended on a cluster did."""
    if listen is None:
        return
    study = open_study(search.storage, search.name, search.settings)
    ended = [one for one in study.get_trials(deepcopy=False) if one.state.is_finished() and one.datetime_complete]
    if ended:
        last = max(ended, key=lambda one: str(one.datetime_complete))
        value = "" if last.value is None else f", score {last.value:.2f}"
        best = max((one.value for one in ended if one.value is not None), default=None)
        told = f"{last.state.name.lower()}{value}"
        listen(SearchEvent(len(ended), search.settings.trials, best, last.number, told))


def _tell(study: Study, search: Search, trial: Trial, detail: Any, listen: SearchListener | None) -> None:
    if listen is None:
        return
    scores = [one.value for one in study.get_trials(deepcopy=False) if one.value is not None]
    ended = sum(one.state.is_finished() for one in study.get_trials(deepcopy=False))
    listen(SearchEvent(ended, search.settings.trials, max(scores, default=None), trial.number, detail))


def _ignore(event: Any) -> None:
    """Take an event that nobody listens to."""


def end_search(search: Search) -> SearchResult:
    """Write the best config and the report."""
    from optuna.trial import TrialState

    study = open_study(search.storage, search.name, search.settings)
    trials = study.get_trials(deepcopy=False)
    counts = {state: sum(one.state == state for one in trials) for state in TrialState}
    complete = [one for one in trials if one.state == TrialState.COMPLETE]
    best = max(complete, key=lambda one: (one.value, -one.number), default=None)
    paths = list(write_search_report(search.folder, search.config.title(), search.arm, search.settings, study))
    settings: dict[str, Any] = {}
    if best is not None:
        settings = settings_of(search.settings, best.params)
        write_text_atomic(search.folder / "best.yaml", save_config(with_settings(search.given, settings)))
        paths.insert(0, search.folder / "best.yaml")
    return SearchResult(
        folder=search.folder,
        best=settings,
        score=None if best is None else best.value,
        finished=len(complete),
        pruned=counts[TrialState.PRUNED],
        failed=counts[TrialState.FAIL],
        paths=tuple(paths),
    )
