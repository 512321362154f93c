"""An experiment, arms x seeds on one task: plan, resume, run, record, ship the best student."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, cast

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, ROUNDING_KEYS, STUDENT_ARMS, Arm, Config
from kdlora.configfile import PATH_KEYS, build_config, expand_target, known_keys, load_config, save_config
from kdlora.data.load import Splits, load_splits
from kdlora.data.tasks import Task, find_label
from kdlora.errors import ArtifactError, ConfigError, KdLoraError
from kdlora.evidence.defer import settle_goals
from kdlora.evidence.records import ExperimentLayout, RunRecord, read_record, read_results, write_results
from kdlora.experiment.deferral import decide_student, is_decided, rows_to_promise
from kdlora.experiment.deployment import deploy_student, is_deployed
from kdlora.experiment.engines import Engine, gpus_for, open_engine, shared_machine
from kdlora.experiment.jobs import Job, Queue, carry_out, refuse_another_teacher, undamaged_record
from kdlora.experiment.plan import Lesson, PlannedRun, plan_runs
from kdlora.experiment.preview import ExperimentPlan, make_plan
from kdlora.experiment.recording import TaskFacts, keep_examples, keep_shipped, logged, look_at, ship_student
from kdlora.experiment.scoring import doubts_of_teacher
from kdlora.experiment.settle import check_table, with_metric, with_recorded, with_values
from kdlora.experiment.stages import Stage, refuse_exchanged_teacher
from kdlora.experiment.team import Team, gather_team
from kdlora.extras import check_installed
from kdlora.report.collect import load_run
from kdlora.report.findings import choose_student
from kdlora.report.page import html_table
from kdlora.report.report import make_report
from kdlora.report.tables import arm_table
from kdlora.searchconfig import Resources
from kdlora.section import DeferConfig, ExportConfig
from kdlora.system.children import run_in_child
from kdlora.system.launch import read_launch
from kdlora.system.ownership import check_folder as refuse_foreign_folder
from kdlora.system.ownership import read_manifest, remove_abandoned
from kdlora.system.storage import claim_folder, hold_lock, mark_folder, write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

Listener = Callable[[Stage, Any], None]

_FREE_KEYS = {
    *("name", "report.paper", "run.arms", "run.seeds", "run.fail_fast", "run.devices", "run.report_to"),
    *("run.checkpoint_seconds", "run.keep_checkpoints", "run.threads"),
    *(f"{role}.train.{key}" for role in ("teacher", "student") for key in ROUNDING_KEYS),
    *(f"export.{key}" for key in ExportConfig.model_fields),
    *(f"defer.{key}" for key in DeferConfig.model_fields),
}
"""Keys that may change between two calls on one folder: they add runs, or change no figure but by rounding."""
_OF_STUDENTS = ("student.", "lora.", "distil.", "data.unlabelled", "data.max_unlabelled_examples", "data.augment")
"""Beginnings of the keys that a teacher with all weights tuned does not depend on."""


@dataclass(frozen=True)
class ExperimentResult:
    """What an experiment left behind.

    Attributes:
        folder: the experiment folder.
        records: one record per run, in the order of the plan.
        shipped: the record of the run that became `student/`; None where no student run finished.
        notes: what was inferred or dropped on the way, in plain sentences.
        is_export_lost: whether the export broke off, as without memory; the same call again makes it.

    Examples:
        >>> sorted({record.arm for record in result.records})
        ['fft', 'kd-fft', 'kd-lora', 'student-lora', 'words']
    """

    folder: Path
    records: list[RunRecord]
    shipped: RunRecord | None
    notes: tuple[str, ...] = ()
    is_export_lost: bool = False

    def __repr__(self) -> str:
        shipped = "nothing shipped" if self.shipped is None else f"{self.shipped.arm} seed {self.shipped.seed} shipped"
        return f"ExperimentResult({str(self.folder)!r}, {len(self.records)} runs, {len(self.failed)} failed, {shipped})"

    def _repr_html_(self) -> str:
        return html_table(arm_table(self.records))

    @property
    def layout(self) -> ExperimentLayout:
        """The names of the files in the folder."""
        return ExperimentLayout(self.folder)

    @property
    def failed(self) -> list[RunRecord]:
        """The runs that did not finish."""
        return [record for record in self.records if record.status == "failed"]


def plan_experiment(config: Config, out: str | Path | None = None) -> ExperimentPlan:
    """Say what an experiment would do, and on what; nothing is written and nothing trained."""
    config, layout = _settle_paths(config, out)
    config, splits, _, finished = _look(config, layout)
    return make_plan(config, layout, check_table(config, splits), finished, read_launch().count)


def run_experiment(
    config: Config,
    out: str | Path | None = None,
    *,
    listen: Listener | None = None,
    before: Callable[[ExperimentPlan], None] | None = None,
) -> ExperimentResult:
    """Run every arm and seed that is not finished yet, then ship the best student and write the report.

    Where several processes were started for it, as `accelerate launch` does, all of them call this: they train every
    run together, and the first of them plans and writes.

    Args:
        config: the experiment.
        out: its folder; default `runs/<name>`. The same call again repeats no finished stage.
        listen: called with the stage and each event in it.
        before: called with the plan before anything is written or trained, where something is left to train; what
            it raises ends the call.

    Raises:
        KdLoraError: if the config, its data or its models do not fit, or the folder belongs to another config.

    Examples:
        >>> result = run_experiment(config, "runs/reviews")
        >>> result.layout.report_html.exists()
        True
    """
    config, layout = _settle_paths(config, out)
    with gather_team(config) as team:
        if team.launch.rank > 0:
            end = team.follow(config, layout)
            records = read_results(layout.results)
            best = next((one for one in records if [one.arm, one.seed] == end["shipped"]), None)
            return ExperimentResult(layout.root, records, best, tuple(end["notes"]))
        result = _lead(config, layout, team, listen or (lambda stage, event: None), before)
        shipped = None if result.shipped is None else [result.shipped.arm, result.shipped.seed]
        team.end(kind="done", shipped=shipped, notes=result.notes)
    return result


def _settle_paths(config: Config, out: str | Path | None) -> tuple[Config, ExperimentLayout]:
    """Resolve what a caller wrote by hand against the current folder; the experiment's folder keeps the config."""
    folder = expand_target(out) if out is not None else Path("runs") / config.title()
    return build_config(config.model_dump(mode="json")), ExperimentLayout(folder)


def _look(config: Config, layout: ExperimentLayout) -> tuple[Config, Splits, TaskFacts, dict[str, RunRecord]]:
    """Settle the config by what is recorded, load the data, and find the runs that need not be repeated."""
    refuse_foreign_folder(layout.root, "experiment")
    asked, config = config, with_recorded(config, layout.config)
    check_folder(config, layout, asked)
    copies, kept = layout.copies if layout.copies.exists() else None, with_metric(config, layout)
    splits = load_splits(config.task, config.data, copies_in=copies)
    if kept.task.metric not in (config.task.metric, *splits.task.metrics):  # an earlier version chose another one
        config, splits = kept, load_splits(kept.task, kept.data, copies_in=copies)
    if splits.task.kind == "tokens" and "words" in config.run.arms:
        told = "a bag of words has one answer a text, and this task wants one a word"
        if not (arms := tuple(arm for arm in config.run.arms if arm != "words")):
            raise ConfigError(f"run.arms: {told}; name others")
        config = with_values(config, {"run.arms": arms})
        splits = replace(splits, notes=(*splits.notes, f"The arm words is left out: {told}."))
    _check_wishes(config, splits, layout)
    facts = look_at(splits, config.data)
    finished = _finished(config, layout, facts, {})
    refuse_exchanged_teacher(config, layout, splits, finished.values())
    return config, splits, facts, finished


def _check_wishes(config: Config, splits: Splits, layout: ExperimentLayout) -> None:
    """Refuse what is asked of the shipped student and could not be had after all trainings."""
    if "openvino" in config.export.formats and not is_deployed(config, layout):
        check_installed("export.formats: openvino", "openvino-export")
    if config.export.min_recall and splits.task.kind != "tokens":
        raise ConfigError("export.min_recall: only a task of tokens has types of entities; leave it out")
    for name in config.export.min_recall:
        find_label(name, splits.task.label_types, "export.min_recall")
    if config.export.thresholds is not None:
        settle_goals(splits.task, config.export.thresholds)
    if config.defer.error is not None:
        rows_to_promise(splits.task, splits.test)


def _lead(
    config: Config,
    layout: ExperimentLayout,
    team: Team,
    listen: Listener,
    before: Callable[[ExperimentPlan], None] | None,
) -> ExperimentResult:
    config, splits, facts, finished = _look(config, layout)
    asked, plan = config, None
    if len(finished) < len(plan_runs(config)):
        splits = check_table(config, splits)
        plan = make_plan(config, layout, splits, finished, team.launch.count)
        config = plan.config
        for name, text in plan.lines():
            logger.info("%s: %s", name, text)
        if before is not None:
            before(plan)
    doing = f"runs the experiment in {layout.root}"
    with hold_lock(layout.lock, doing, remedy=", or name another folder with --out") as check:
        claim_folder(layout.root, "experiment")
        # Another call may have come between the plan and the lock, and have settled what is open here.
        check_folder(asked if with_recorded(asked, layout.config) == asked else config, layout)
        finished = _finished(config, layout, facts, finished)
        remove_abandoned(layout.root)
        if not layout.config.exists():  # what is left open today may be left open tomorrow
            is_open = {key: value if value in (None, "auto") else False for key, value in _flatten(asked).items()}
            mark_folder(layout.root, "experiment", open=is_open, rows=facts.fingerprint(config))
        write_text_atomic(layout.config, save_config(config))
        if plan is not None:
            write_json_atomic(layout.plan, plan.to_dict())
        keep_examples(layout, splits)
        records = _run_all(config, layout, facts, finished, team, check, listen)
        try:
            shipped, told, is_lost = _ship_best(config, layout, splits.task, records, listen)
        except Exception:  # the trainings are done: their report is due, whatever hinders the shipping
            make_report(layout.root)
            raise
        check()
        with logged("report", "all", config.teacher_seed):
            make_report(layout.root)
    return ExperimentResult(layout.root, records, shipped, (*splits.notes, *told), is_lost)


def check_folder(config: Config, layout: ExperimentLayout, asked: Config | None = None) -> None:
    """Check that a folder of ours is new, or holds this very experiment, and that no key which was set is open now."""
    if not layout.config.exists():
        return
    there, here = (_flatten(with_metric(one, layout)) for one in (load_config(layout.config), config))
    open_then = (read_manifest(layout.root) or {}).get("open", {})  # version 0.2 noted none
    if asked is not None:
        open_now = {key: value for key, value in _flatten(asked).items() if value in (None, "auto")}
        here |= {key: value for key, value in open_now.items() if open_then.get(key, value) != value}
    data = [f"{section}.{key}" for section, key in PATH_KEYS if section == "data"]
    # Files may lie elsewhere now: finished runs carry a fingerprint of their rows.
    moved = {key for key in data if all(Path(str(one[key])).is_absolute() for one in (there, here))}
    if changed := [key for key in here if there[key] != here[key] and key not in _FREE_KEYS | moved]:
        told = f"{layout.root} belongs to another config; name another folder with --out, or delete it"
        own = config.teacher_arm == "fft" and not config.given_teacher and layout.teacher.exists()
        if own and all(key.startswith(_OF_STUDENTS) for key in changed):
            told = (
                f"{layout.root} belongs to another config; name another folder with --out. Its teacher need not be "
                f"trained again there: --set teacher.fine_tuned={layout.teacher.resolve()}"
            )
        shown = [f"  - {key}: {there[key]!r} there, {here[key]!r} here" for key in changed[:8]]
        shown += [f"  - and {len(changed) - 8} more"] if len(changed) > 8 else []
        raise ArtifactError("\n".join([f"{told}:", *shown]))


def _flatten(config: Config) -> dict[str, Any]:
    seed = None if config.given_teacher else config.teacher_seed
    return {key: attrgetter(key)(config) for key in known_keys()} | {"teacher.seed": seed}


def _finished(
    config: Config, layout: ExperimentLayout, facts: TaskFacts, known: Mapping[str, RunRecord]
) -> dict[str, RunRecord]:
    """Read the records of the runs that need not be repeated; refuse those that were made from other rows."""
    found, rows = {}, facts.fingerprint(config)
    noted = (read_manifest(layout.root) or {}).get("rows", rows)  # an earlier version noted none
    made = {noted if layout.config.exists() else rows}
    for run in plan_runs(config):
        record = known.get(run.key) or undamaged_record(run, layout.root)
        if record is None:
            continue
        made.add(rows if facts.made(record, config) else "")
        place = layout.run(run.arm, run.seed)
        weights = place.adapter if run.arm in LORA_ARMS else place.model
        if run.arm in STUDENT_ARMS and not weights.exists():
            logger.info("%s with seed %d has no weights to ship and is trained again", run.arm, run.seed)
        else:
            found[run.key] = record
    if made != {rows}:
        raise ArtifactError(
            f"{layout.root} was begun with other rows or labels than the config names now, for which its steps and "
            "lengths were chosen: the data changed since. Put back what was there, name another folder with --out, or "
            "delete it"
        )
    if config.given_teacher:
        return found
    teacher = PlannedRun(config.teacher_arm, config.teacher_seed, config)
    left = [run for run in plan_runs(config) if run.key not in found]
    taught = any(run.arm in DISTILLED_ARMS for run in left)
    if taught and not layout.teacher.exists() and found.pop(teacher.key, None) is not None:
        logger.info("the teacher has no weights and is trained again")
        left.append(teacher)
    if teacher in left:
        refuse_another_teacher(teacher, layout.root)
    return found


def _run_all(
    config: Config,
    layout: ExperimentLayout,
    facts: TaskFacts,
    finished: Mapping[str, RunRecord],
    team: Team,
    check: Callable[[], None],
    listen: Listener,
) -> list[RunRecord]:
    """Carry out the runs that are left, as a suite of one cell whose weights are kept."""
    runs = plan_runs(config)
    students = [run for run in runs if run.arm in DISTILLED_ARMS]
    teachers = [run for run in runs if (run.arm, run.seed) == (config.teacher_arm, config.teacher_seed)]
    lesson = Lesson(() if config.given_teacher else tuple(teachers), students)
    queue = Queue(runs, [lesson], layout.root, {"": facts}, finished, ships=True)

    def hear(job: Job, event: Any) -> None:
        listen(Stage(job.kind, job.arm, job.seed), event)

    def carry_out_all(engine: Engine, notes: Sequence[str], later: Container[str] = ()) -> None:
        in_child = run_in_child if team.launch.count == 1 else team.run
        work = functools.partial(carry_out, in_child=in_child, check=check, notes=notes)

        def next_job() -> Job | None:
            return None if config.run.fail_fast and queue.failed else queue.next_job(later)

        for _, outcome in engine.results(work, next_job, hear):
            queue.take(outcome)
            write_results(layout.results, queue.in_order())  # after every run, so that an interrupted one can be read

    if queue.records:
        write_results(layout.results, queue.in_order())
    gpus = gpus_for(config, team.launch.count)
    with open_engine(None, Resources(), (), gpus) as engine:
        notes = shared_machine(gpus)
        carry_out_all(engine, notes, later=DISTILLED_ARMS)
        doubts = doubts_of_teacher(config, layout, queue.in_order()) if students else []
        for doubt in doubts:
            logger.warning(doubt)
        carry_out_all(engine, [*doubts, *notes])
    return queue.in_order()


def _ship_best(
    config: Config, layout: ExperimentLayout, task: Task, records: list[RunRecord], listen: Listener
) -> tuple[RunRecord | None, list[str], bool]:
    """Choose a student on validation, ship, export and decide, unless that is done; with notes, and what is lost."""
    choice = choose_student(task, [load_run(one, layout.run(one.arm, one.seed)) for one in records])
    if choice is None:
        return None, [], False
    named = {(one.arm, one.seed) for one in records}
    kept = [read_record(path) for path in layout.runs.glob("*/run.json")]  # which the report shows, too
    if {(one.arm, one.seed) for one in kept if one.status == "finished" and one.arm in STUDENT_ARMS} - named:
        told = f"{choice.sentence[:-1]}, among the arms and seeds that the last call named."
        choice = choice.model_copy(update={"sentence": told})
    notes, is_lost = list[str](), False
    if not keep_shipped(config, layout, choice):
        with logged("ship", choice.arm, choice.seed):
            run_in_child(ship_student, config, layout, task, choice)
    if not is_deployed(config, layout):
        stage = Stage("deploy", cast("Arm", choice.arm), choice.seed)
        try:
            notes += run_in_child(deploy_student, config, layout, on_message=lambda step: listen(stage, step))
        except OSError:
            raise
        except Exception as error:  # a student that cannot be exported is still a student
            done = "measured" if layout.exported.exists() else "exported"
            is_lost = not isinstance(error, KdLoraError)
            logger.error("the student was not %s: %s", done, error, exc_info=is_lost)
            notes.append(f"The student was not {done}: {error}")
    if not is_decided(config, layout):
        with logged("decide", "student", config.teacher_seed):
            notes += run_in_child(decide_student, config, layout)
    return next(one for one in records if (one.arm, one.seed) == (choice.arm, choice.seed)), notes, is_lost
