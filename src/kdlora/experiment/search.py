"""A search over fields of a config: trials on held-out rows, pruned by epoch, shared by processes; its report."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from filelock import FileLock

from kdlora.config import DISTILLED_ARMS, STUDENT_ARMS, Arm, Config
from kdlora.configfile import expand_target, save_config
from kdlora.errors import ArtifactError, ConfigError, KdLoraError, counted, harmless
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.engines import Engine, LostError, local_paths, open_engine
from kdlora.experiment.jobs import train_afresh
from kdlora.experiment.plan import identity_over, reset_unused
from kdlora.experiment.study import (
    Reporter,
    ask,
    check_space,
    counted_trials,
    inspect_rows,
    make_teacher,
    open_study,
    planned_trials,
    retry_failed,
    settings_of,
    train_trial,
    with_settings,
)
from kdlora.extras import check_installed
from kdlora.foreign import read_json
from kdlora.report.page import Cell, Figure, Link, Page, Paragraph, Prose, Section, Table, to_csv, write_page
from kdlora.report.plots import Series, Style, learning_curves
from kdlora.report.wording import arm_title
from kdlora.searchconfig import Choices, SearchConfig
from kdlora.system.children import ChildDiedError, run_in_child
from kdlora.system.integrity import hash_json, is_sealed_or_old, seal
from kdlora.system.ownership import check_folder, remove
from kdlora.system.storage import claim_folder, write_json_atomic, write_text_atomic

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

logger = logging.getLogger(__name__)

_SHOWN = 20


@dataclass(frozen=True)
class Search:
    """A search under way: the config as given, the same with the one arm that is trained, and where it all goes."""

    given: Config
    config: Config
    settings: SearchConfig
    arm: Arm
    folder: Path
    rows: str  # fingerprint of those that are used, and of a given teacher

    def study(self) -> Study:
        """Open the study, which all processes share; what makes its trials comparable names it."""
        own = self.settings.model_copy(update={"arm": self.arm})
        values = identity_over(self.settings.space, self.config)
        values |= {"seeds": self.config.run.seeds[:1], "rows": self.rows}
        values |= {"search": own.model_dump(mode="json", exclude={"trials", "resources"})}
        return open_study(self.folder, f"{self.config.title()}-{hash_json(values)[:10]}", self.settings)

    @contextmanager
    def hold(self, kind: str, config: Config, arm: Arm) -> Iterator[ExperimentLayout]:
        """Give the folder of a training, named by what decides its figures; another process that needs it waits."""
        values = identity_over(self.settings.space, config) | {"arm": arm, "rows": self.rows}
        values["seed"] = config.teacher_seed if kind == "teachers" else config.run.seeds[0]
        layout = ExperimentLayout(self.folder / kind / hash_json(values)[:12], shared_folder=self.folder)
        layout.root.mkdir(parents=True, exist_ok=True)
        with FileLock(layout.root / ".lock"):
            yield layout


@dataclass(frozen=True)
class SearchEvent:
    """Where a search stands."""

    done: int  # trials that have ended
    trials: int  # trials in all
    best: float | None  # the best score so far; None before the first
    number: int  # of the trial that this is about
    detail: Any  # a training's progress, or a sentence on how the trial ended


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

    Examples:
        >>> found.finished + found.pruned
        2
    """

    folder: Path
    best: dict[str, Any]
    score: float | None
    finished: int
    pruned: int
    failed: int
    paths: tuple[Path, ...] = ()


def run_search(
    config: Config,
    settings: SearchConfig,
    out: str | Path | None = None,
    *,
    on: str | None = None,
    listen: Callable[[SearchEvent], None] | None = None,
) -> SearchResult:
    """Search fields of a config for the best score on held-out training rows.

    The config's own validation and test rows are never scored, so that what is reported of the best config stays
    clean: `kdlora run OUT/best.yaml` trains on all training rows. The same call again goes on; several processes
    with the same folder share the trials.

    Args:
        config: the base.
        settings: space, number of trials, pruning.
        out: folder; default `runs/<name>-search`.
        on: `ray` or `ray://HOST:PORT`: the cluster that carries the trials out; default: this process.
        listen: called with each event.

    Raises:
        KdLoraError: if the space, the data or the models do not fit.

    Examples:
        >>> found = run_search(config, settings, "runs/search")
    """
    search = begin_search(config, settings, out)
    retry_failed(search.study(), search.folder / "trials")
    with open_engine(on, search.settings.resources, _paths(search)) as engine:
        try:
            _carry_out_trials(search, engine, listen)
        finally:  # also after Ctrl-C: what there is can be read
            result = _end(search)
    return result


def begin_search(config: Config, settings: SearchConfig, out: str | Path | None) -> Search:
    check_installed("a search", "search")
    students: list[Arm] = [arm for arm in STUDENT_ARMS if arm in config.run.arms]
    arm = settings.arm or [*students, config.teacher_arm][0]
    if config.given_teacher and arm == "fft":
        raise ConfigError("a teacher that is given is not trained, so nothing of it can be searched; set search.arm")
    given, config = config, with_settings(config, {"run.arms": [arm]})
    check_space(config, settings, arm)
    if settings.arm is None and {"kd-lora", "kd-fft"} <= set(students):
        logger.warning(
            "the trials train kd-lora; best.yaml trains kd-fft too, which ships more often, with a rate of its own "
            "(student.full_learning_rate) and without lora.*. --set search.arm=kd-fft searches that arm"
        )
    folder = (expand_target(out) if out is not None else Path("runs") / f"{config.title()}-search").absolute()
    check_folder(folder, "search")
    rows, chosen = run_in_child(inspect_rows, config, settings)
    if not settings.names_models:
        follows = True if arm == "lora" and "student.train.learning_rate" in settings.space else None
        given, config = (chosen.fill_in(one, follows=follows) for one in (given, config))
    search = Search(given, config, settings, arm, folder, rows)
    claim_folder(folder, "search")
    was_begun = (folder / "journal.log").exists()
    if not search.study().trials and was_begun:
        other = "%s has trials of other settings, space, rows or models; this search begins anew, its best.yaml too"
        logger.warning(other, folder)
    write_text_atomic(folder / "search.yaml", save_config(config))
    return search


def _paths(search: Search) -> list[str]:
    """List what every node must have: the folder, and all data and models that a trial may name."""
    paths = [str(search.folder / "search.yaml"), *local_paths(search.config)]
    for key, one in search.settings.space.items():
        chosen = one.values if isinstance(one, Choices) else ()
        paths += [path for value in chosen for path in local_paths(with_settings(search.config, {key: value}))]
    return paths


def _carry_out_trials(search: Search, engine: Engine, listen: Callable[[SearchEvent], None] | None) -> None:
    """Carry out trials until all are done or under way elsewhere; the journal counts them, so none is done twice."""
    study = search.study()
    is_over, lost, planned = False, 0, planned_trials(search.settings)

    def tell(number: int, detail: Any) -> None:
        if listen is not None:
            trials = counted_trials(study)
            finished = (one for one in trials if one.state.name == "COMPLETE")  # a pruned one has its last score
            best = max((one.value for one in finished if one.value is not None), default=None)
            ended = sum(one.state.is_finished() for one in trials)
            listen(SearchEvent(ended, planned, best, number, detail))

    trials = engine.results(carry_out_trial, lambda: None if is_over else search, lambda _, event: tell(*event))
    for _, ended in trials:
        if isinstance(ended, LostError) and lost < search.settings.trials:
            logger.error("a trial was lost: %s", ended)
            lost += 1
        elif isinstance(ended, Exception):
            raise ended
        elif ended is None:
            is_over = True
        else:
            tell(*ended)


def carry_out_trial(search: Search, hear: Callable[[tuple[int, Any]], None] | None = None) -> tuple[int, str] | None:
    """Carry out the next trial, unless none is left; tell the study, and give its number and how it ended.

    A config that fails is a failed trial, but a full disk ends the search.
    """
    from optuna.trial import TrialState

    study = search.study()
    taken = ask(study, search.settings, search.folder / "trials")
    if taken is None:
        return None
    trial, lock = taken
    try:
        score = _train(search, trial, lambda event: None if hear is None else hear((trial.number, event)))
    except OSError:
        raise
    except Exception as error:
        fault = harmless(f"{type(error).__name__}: {error}")
        logger.error("trial %d failed: %s", trial.number, fault, exc_info=not isinstance(error, KdLoraError))
        trial.set_user_attr("error", fault)
        study.tell(trial, state=TrialState.FAIL)
        if isinstance(error, ChildDiedError) and "continues" not in trial.user_attrs:  # once more, from its checkpoint
            study.enqueue_trial(trial.params, user_attrs={"continues": trial.number})
        return trial.number, f"failed: {fault}"
    else:
        study.tell(trial, score, state=TrialState.PRUNED if score is None else TrialState.COMPLETE)
        return trial.number, "pruned" if score is None else f"score {score:.2f}"
    finally:
        lock.release()


def _train(search: Search, trial: Trial, hear: Callable[[Any], None]) -> float | None:
    """Score a trial's config, trained unless another trial has trained the very same; None where it was stopped."""
    settings, arm = settings_of(search.settings, trial.params), search.arm
    config = with_settings(search.config, settings)
    if search.settings.names_models:  # rates and lengths are those of the trial's own models
        config = run_in_child(inspect_rows, config, search.settings, False)[1].fill_in(config)
    with search.hold("trials", reset_unused(config, arm), arm) as layout:
        stop, known = layout.root / "stop", layout.root / "trial.json"
        trial.set_user_attr("folder", f"trials/{layout.root.name}")
        reporter = Reporter(trial, stop, hear)
        if content := _read_trial(known):
            score, history = content["score"], content["history"]
        else:
            taught = arm in DISTILLED_ARMS and not config.teacher.is_table
            place = replace(layout, shared_teacher=_make_teacher(search, config, hear) if taught else None)
            remove(stop)
            arguments = (config, search.settings, place, arm, stop)
            try:
                score, history = train_afresh(
                    lambda: run_in_child(train_trial, *arguments, on_message=reporter.hear), layout.runs
                )
            except ArtifactError:
                if taught:  # the next trial looks at what the teacher said, and computes what is damaged
                    remove(place.teacher.parent / "done")
                raise
            remove(layout.runs)
            remove(stop)
            if score is not None:
                write_json_atomic(known, seal({"settings": settings, "score": score, "history": history}))
        for entry in history:  # those before an interruption among them
            reporter.report(math.ceil(entry["epoch"]), float(entry["score"]))
    return score


def _read_trial(path: Path) -> dict[str, Any] | None:
    """Read what a training of these settings scored, if there was one and its file is as it was written."""
    if not path.exists():
        return None
    with contextlib.suppress(ArtifactError):
        if is_sealed_or_old(content := read_json(path)):
            return content
    logger.warning("%s is damaged; it is trained again", path)
    return None


def _make_teacher(search: Search, config: Config, hear: Callable[[Any], None]) -> Path:
    """Give the teacher of a trial, made once for all trials with the same `teacher` section."""
    arm = config.teacher_arm
    made = reset_unused(config, arm).model_copy(update={"data": config.data})  # it labels the copies of the texts too
    with search.hold("teachers", made, arm) as layout:
        if not (layout.root / "done").exists():
            train_afresh(
                lambda: run_in_child(make_teacher, made, search.settings, layout, on_message=hear), layout.runs
            )
            write_text_atomic(layout.root / "done", layout.root.name)
        remove(layout.runs)  # its checkpoints, three times the weights, which nobody resumes any more
    return layout.teacher


def _end(search: Search) -> SearchResult:
    trials = counted_trials(search.study())
    finished, pruned, failed = (
        [one for one in trials if one.state.name == state] for state in ("COMPLETE", "PRUNED", "FAIL")
    )
    ranked = sorted(finished, key=lambda one: -(one.value or 0.0))  # of equal ones the earlier first
    told = [f"Trial {one.number} failed: {one.user_attrs['error']}" for one in failed if "error" in one.user_attrs]
    warnings = [Paragraph(text, "warning") for text in told[:_SHOWN]]
    blocks = [_trial_table(ranked, search.settings), *warnings, _curves(ranked, pruned)]
    lead = _lead(search, ranked, len(pruned), len(failed))
    page = Page(f"Search: {search.config.title()}", "search", lead, (Section("Trials", "trials", blocks),))
    report = write_page(page, search.folder / "search.md", search.folder / "search.html")
    write_text_atomic(search.folder / "trials.csv", to_csv(_lines(trials, search.settings)))
    counts, paths = (len(ranked), len(pruned), len(failed)), (*report.paths, search.folder / "trials.csv")
    if not ranked:
        remove(search.folder / "best.yaml")  # of another search in this folder
        return SearchResult(search.folder, {}, None, *counts, paths)
    best = settings_of(search.settings, ranked[0].params)
    write_text_atomic(search.folder / "best.yaml", save_config(with_settings(search.given, best)))
    return SearchResult(search.folder, best, ranked[0].value, *counts, (search.folder / "best.yaml", *paths))


def _curves(ranked: Sequence[FrozenTrial], pruned: Sequence[FrozenTrial]) -> Figure | None:
    others, stopped = "mean of the other finished trials", "mean of the pruned trials"
    groups = {"the best trial": ranked[:1], others: ranked[1:], stopped: pruned}
    curves = [
        Series(name, Style(number), tuple(point for one in members for point in one.intermediate_values.items()))
        for number, (name, members) in enumerate(groups.items())
    ]
    return learning_curves(
        curves, title="Score by epoch", value="score on the held-out rows", identity="epochs", of="trial"
    )


def _setting(trial: FrozenTrial, search: SearchConfig, key: str) -> str:
    value = settings_of(search, trial.params)[key]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _lead(search: Search, ranked: Sequence[FrozenTrial], pruned: int, failed: int) -> Prose:
    ended = {"were pruned": pruned, "failed": failed}
    finished = f"{counted(len(ranked), 'trial')} finished"
    told = ", ".join([finished, *(f"{some} {how}" for how, some in ended.items() if some)])
    if not ranked:
        return Prose("There is <strong>no best config yet</strong>: {}.").format(told)
    equal = sum(one.value == ranked[0].value for one in ranked) - 1
    return Prose(
        "{}: {}. The best scores <strong>{:.2f}</strong> on the held-out rows{}, the median {:.2f}: "
        "<strong>{}</strong>. Trials were judged on training rows that were held out ({:.4g}%); the validation "
        "and test rows of the config were not scored. The best of many is too high: report what best.yaml scores on "
        "them. A trial is one seed: no verdict on the difference of two."
    ).format(
        *(arm_title(search.arm), told, ranked[0].value, f", as {equal} more" if equal else ""),
        statistics.median(one.value or 0.0 for one in ranked),
        ", ".join(f"{key} {_setting(ranked[0], search.settings, key)}" for key in search.settings.space),
        100 * search.settings.validation_fraction,
    )


def _trial_table(ranked: Sequence[FrozenTrial], search: SearchConfig) -> Table:
    def number(one: FrozenTrial) -> Cell:
        name = str(one.number)
        return Cell(name, (Link(name, quote(f"{one.user_attrs['folder']}/trial.json"), f"trial {name}"),))

    columns: dict[str, Callable[[FrozenTrial], Cell | str]] = {
        "trial": number,
        "score": lambda one: f"{one.value:.2f}",
        **{key: lambda one, key=key: _setting(one, search, key) for key in search.space},  # type: ignore[misc]
    }
    told = f"The best {_SHOWN} of {len(ranked)}; trials.csv has all." if len(ranked) > _SHOWN else ""
    return Table.of("Trials that finished, the best first", ranked[:_SHOWN], columns, note=told)


def _lines(trials: Sequence[FrozenTrial], search: SearchConfig) -> list[Sequence[Any]]:
    lines: list[Sequence[Any]] = [("trial", "state", "score", "epochs", *search.space, "error")]
    for one in trials:
        settings = settings_of(search, one.params)
        values = [settings.get(key) for key in search.space]
        plain = (value if isinstance(value, int | float | None) else str(value) for value in values)
        head = (one.number, one.state.name.lower(), one.value, max(one.intermediate_values, default=0))
        lines.append((*head, *plain, one.user_attrs.get("error")))
    return lines
