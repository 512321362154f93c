"""Above which probability a label is said: the thresholds of labels, fitted on validation rows, of what ships."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from kdlora.data.spool import label_array
from kdlora.data.tasks import Task
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.predict import Classifier
from kdlora.errors import DataError, listed
from kdlora.evidence.defer import (
    Deferral,
    FittedModel,
    Goal,
    NoThresholdError,
    Thresholds,
    fit_threshold,
    judge_threshold,
    log_odds,
    settle_goals,
    shift_logits,
)
from kdlora.evidence.metrics import weighted_metric
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.deployment import exported_files, labelled, load_without_copies, texts_of, unseen_rows
from kdlora.experiment.recording import shipped_record, write_card
from kdlora.experiment.scoring import open_finished
from kdlora.report.shipped import read_part
from kdlora.system.ownership import remove
from kdlora.system.storage import hold_lock, write_json_atomic


@contextmanager
def locked(experiment: str | Path) -> Iterator[ExperimentLayout]:
    """Keep others from the experiment: a run may ship another student while this one is judged."""
    layout, _, _ = open_finished(experiment)
    with hold_lock(layout.lock, f"works on the experiment in {layout.root}"):
        yield layout


def shipped_models(layout: ExperimentLayout) -> Iterator[tuple[str, Classifier]]:
    """Load what ships, one file after another, to look at all of its answers; what is decided is written there."""
    for name, file in ({"student": layout.student} | exported_files(layout)).items():
        if file.exists():
            yield name, Classifier.load(file, decisions="thresholds")


def fit_thresholds(experiment: str | Path, goal: Goal | Mapping[str, Goal | None] | None = None) -> Thresholds:
    """Fit above which probability a label is said, on validation rows, and keep it beside each file that ships.

    From then on `Classifier` and `predict` decide by it. Each file has thresholds of its own, since int8 moves them. A
    promised error rate goes, for it was of other answers.

    Args:
        experiment: an experiment's folder; its task is multi-label, or has two labels.
        goal: what is highest at the threshold: "f1", "macro_f1", "accuracy", "balanced_accuracy" or "matthews" of the
            label, or the precision that is wanted, such as 0.9, with the highest recall. A mapping from label to goal
            fits these labels alone; of a task with two labels, the one that it names is the positive one, else the
            second. By default the task's own metric where it is one of these or `recall@0.9:LABEL`, else F1,
            and a label keeps that of its run, or 0.5, where its own would lower the task's score on these rows.

    Returns:
        Thresholds and what they do, on test rows where there are some; `thresholds.json` holds them for the report.

    Raises:
        DataError: another kind of task, an unknown label.
        ConfigError: an unknown metric, a precision that is none.
        NoThresholdError: of one of the files (without a goal: of all) no label can be fitted; nothing is written.
        ArtifactError: no finished experiment, or another process works on it.

    Examples:
        >>> thresholds = fit_thresholds("runs/reviews", "f1")
    """
    with locked(experiment) as layout:
        return fit_all(layout, goal)


def fit_all(layout: ExperimentLayout, goal: Goal | Mapping[str, Goal | None] | None) -> Thresholds:
    _, config, task = open_finished(layout.root)
    goals, splits = settle_goals(task, goal), load_without_copies(config, layout)
    judged, source = splits.validation, "validation"
    earlier = getattr(read_part(layout.thresholds, Thresholds, "")[0], "models", ())
    models, decided, notes, able = [], [], list[str](), []
    try:
        if splits.test is not None:
            judged, source = unseen_rows(splits, splits.test, "the test split")[0], "test"
    except DataError as fault:
        notes.append(f"{fault}, so what the thresholds do is told of the validation rows that chose them")
    record = shipped_record(layout)
    for name, model in shipped_models(layout):
        usual = {} if record is None else record.thresholds(model.folder.temperature)
        thresholds, fitted, reasons = _fit(model, task, goals, usual, goal is not None, splits.validation)
        notes += [reason for reason in reasons if reason not in notes]
        able.append(bool(fitted))
        told = {label.label: label.goal for one in earlier if one.name == name for label in one.labels}
        told |= {label: goals[label] for label in fitted}
        models.append(_judge(name, model, usual, thresholds, told, task, judged))
        decided.append((model.folder, Decisions(thresholds=thresholds)))
    if not able or not (any if goal is None else all)(able):
        kept = "; what was decided before stays" if layout.thresholds.exists() else ""
        raise NoThresholdError(("; ".join(notes) or f"{layout.root} ships no student") + kept)
    gone = "the promised error rate was of other answers and is gone; kdlora defer promises anew"
    passing = [gone] if getattr(read_part(layout.deferral, Deferral, "")[0], "promises", False) else []
    remove(layout.deferral)
    for folder, decisions in decided:
        write_decisions(folder, decisions)
    result = Thresholds(len(splits.validation), len(judged), source, tuple(models), tuple(notes))
    write_json_atomic(layout.thresholds, asdict(result))
    write_card(config, layout)
    return replace(result, notes=(*notes, *passing))


def _fit(
    model: Classifier, task: Task, goals: Mapping[str, Goal], usual: Mapping[str, float], is_asked: bool, rows: Dataset
) -> tuple[dict[str, float], list[str], list[str]]:
    """Give one file's thresholds, the labels that got theirs, and why others keep what they have, or the usual one."""
    logits, temperature = model.predict_logits(texts_of(rows)), model.folder.temperature
    thresholds = {**usual, **model.decisions.thresholds} if task.kind == "multi-label" else {}
    place, once = (model.folder.file or model.folder.path).name, np.ones((1, len(rows)))
    right = label_array(rows).astype(np.int64)
    fitted, reasons, harmful = list[str](), list[str](), list[str]()

    def score(used: Mapping[str, float]) -> float:
        moved = shift_logits(logits, task.label_names, used, temperature)
        return float(np.mean([weighted_metric(task, metric, moved, right)(once)[0] for metric in task.metrics]))

    for name, goal in goals.items():
        odds, has = _binary(task, name, logits, rows, temperature)
        try:
            new = {**thresholds, name: fit_threshold(odds, has, goal)}
        except NoThresholdError as fault:
            its = f"its threshold in {place}" if name in thresholds else "0.5"
            reasons.append(f"{name!r:.80} keeps {its}: {fault}")
            continue
        # No shift changes a ranking, and the mean of labels' F1 rises with that of one.
        is_safe = all(metric.startswith(("average_precision", "recall@")) for metric in task.metrics)
        is_safe |= task.kind == "multi-label" and task.metrics == ("macro_f1",) and goal == "f1"
        if is_harmful := not is_safe and score(new) < score({**thresholds, name: usual.get(name, 0.5)}) - 1e-9:
            harmful.append(f"{name!r:.80}")
        if is_asked or not is_harmful:
            thresholds = new
            fitted.append(name)
        else:
            thresholds.pop(name, None)
            thresholds |= {name: usual[name]} if name in usual else {}
    if harmful:
        fate = "kept, as it was asked for" if is_asked else "left out, unless it is asked for (--metric f1)"
        told = f"such a threshold in {place} lowers the task's own score on validation, and is {fate}"
        reasons.append(f"{listed(harmful)}: {told}")
    return thresholds, fitted, reasons


def _binary(
    task: Task, name: str, logits: np.ndarray, rows: Dataset, temperature: float
) -> tuple[np.ndarray, np.ndarray]:
    """Give the log-odds of a label, and where it is right."""
    column, labels = task.label_names.index(name), label_array(rows)
    has = labels[:, column] if task.kind == "multi-label" else labels == column
    return log_odds(logits, task.kind, column, temperature), has.astype(np.int64)


def _judge(
    name: str,
    model: Classifier,
    usual: Mapping[str, float],
    thresholds: Mapping[str, float],
    goals: Mapping[str, Goal],
    task: Task,
    rows: Dataset,
) -> FittedModel:
    logits, temperature, given = model.predict_logits(texts_of(rows)), model.folder.temperature, labelled(rows, task)
    told = [
        judge_threshold(
            label, goals.get(label, "an earlier call"), at, *_binary(task, label, logits, rows, temperature)
        )
        for label, at in thresholds.items()
        if at != usual.get(label)
    ]
    before, after = (
        given.score(task, shift_logits(logits, task.label_names, used, temperature)) for used in (usual, thresholds)
    )
    return FittedModel(name, before, after, tuple(told))
