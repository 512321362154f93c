"""Fit the thresholds of labels for what an experiment ships, and do what its config says about answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from datasets import Dataset

from kdlora.config import Config
from kdlora.configfile import load_config
from kdlora.data.load import load_splits
from kdlora.data.spool import label_array
from kdlora.data.tasks import Task
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.predict import Classifier
from kdlora.errors import ConfigError, DataError, KdLoraError, ModelError, did_you_mean
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.evidence.records import ExperimentLayout
from kdlora.evidence.thresholds import (
    METRICS,
    FittedModel,
    Goal,
    NoThresholdError,
    Thresholds,
    fit_threshold,
    judge_threshold,
    log_odds,
    shift_logits,
)
from kdlora.experiment.deferral import defer_experiment, shipped_models, unseen_rows
from kdlora.experiment.deployment import texts_of
from kdlora.experiment.scoring import groups_of, recorded_task
from kdlora.experiment.shipping import forget_decisions, write_card
from kdlora.system.integrity import hash_files, hash_json
from kdlora.system.ownership import remove
from kdlora.system.storage import write_json_atomic, write_text_atomic


def fit_thresholds(experiment: str | Path, goal: Goal | Mapping[str, Goal | None] | None = None) -> Thresholds:
    """Fit above which probability a label is said, on validation rows, and keep it beside each file that ships.

    From then on `Classifier` and `predict` decide by it. Each file has thresholds of its own, since int8 moves them. A
    promised error rate goes, for it was of other answers.

    Args:
        experiment: an experiment's folder; its task is multi-label, or has two labels.
        goal: what is highest at the threshold: "f1", "macro_f1", "accuracy", "balanced_accuracy" or "matthews" of the
            label, or the precision that is wanted, such as 0.9, with the highest recall. A mapping from label to goal
            fits these labels alone; of a task with two labels, the one that it names is the positive one, else the
            second. By default the task's own metric where it is one of these or `recall@0.9:LABEL`, else F1.

    Returns:
        Thresholds and what they do, on test rows where there are some; `thresholds.json` holds them for the report.

    Raises:
        DataError: another kind of task, an unknown label.
        ConfigError: an unknown metric, a precision that is none.
        NoThresholdError: no threshold reaches the precision, or no label can be fitted; nothing is written.
        ArtifactError: no finished experiment.

    Examples:
        >>> thresholds = fit_thresholds("runs/reviews", "f1")
    """
    layout = ExperimentLayout(Path(experiment))
    config, task = load_config(layout.config), recorded_task(layout)
    goals = settle_goals(task, goal)
    splits = load_splits(config.task, config.data.model_copy(update={"augment": 0}))
    judged, source = splits.validation, "validation"
    if splits.test is not None:
        judged, source = unseen_rows(splits, splits.test, "the test split")[0], "test"
    found, notes, able = [], [], False
    for name, model in shipped_models(layout):
        fitted, reasons = _fit(model, task, goals, splits.validation)
        notes += [reason for reason in reasons if reason not in notes]
        kept = model.decisions.thresholds if task.kind == "multi-label" else {}
        found.append((name, model, {**kept, **fitted}))
        able = able or bool(fitted)
    if not able:
        raise NoThresholdError("; ".join(notes) or f"{layout.root} ships no student")
    models = tuple(_judge(*one, task=task, goals=goals, rows=judged) for one in found)
    if layout.deferral.exists():
        notes.append("the promised error rate was of other answers and is gone; kdlora defer promises anew")
        remove(layout.deferral)
    for _, model, thresholds in found:
        write_decisions(model.folder, Decisions(thresholds=thresholds))
    result = Thresholds(len(splits.validation), len(judged), source, models, tuple(notes))
    write_json_atomic(layout.thresholds, asdict(result))
    write_card(config, layout)
    return result


def settle_goals(task: Task, goal: Goal | Mapping[str, Goal | None] | None) -> dict[str, Goal]:
    """Say what each label's threshold is fitted for."""
    binary = task.kind == "single-label" and task.num_labels == 2
    if not binary and task.kind != "multi-label":
        labels = f" with {task.num_labels} labels" if task.kind == "single-label" else ""
        raise DataError(
            f"thresholds: expected a multi-label task, or one with two labels, got {task.kind}{labels}; "
            + ("a value has no threshold" if task.kind == "regression" else "there the most probable label is said")
        )
    of_labels = dict(filter(None, map(_goal_of, task.metrics)))
    names = tuple(of_labels or task.label_names[1:]) if binary else task.label_names
    goals = dict(goal) if isinstance(goal, Mapping) else dict.fromkeys(names, goal)
    if unknown := [name for name in goals if name not in task.label_names]:
        known, hint = ", ".join(task.label_names), did_you_mean(unknown[0], task.label_names)
        raise DataError(f"thresholds: no label {unknown[0]!r:.80}; there are {known:.200}.{hint}")
    if binary and len(goals) != 1:
        raise DataError(f"thresholds: of two labels one is the positive one, got {', '.join(goals) or 'none'}")
    own = next((name for name in task.metrics if binary and name in METRICS), "f1")
    return {name: check_goal(of_labels.get(name, own) if one is None else one) for name, one in goals.items()}


def _goal_of(metric: str) -> tuple[str, Goal] | None:
    """Read the label that a metric is of, and what for: `recall@0.9:spam` is the recall at a precision of 0.9."""
    name, _, label = metric.partition(":")
    if name == "f1" and label:
        return label, "f1"
    return (label, float(name.removeprefix("recall@"))) if name.startswith("recall@") else None


def check_goal(goal: Goal) -> Goal:
    if isinstance(goal, str):
        if goal not in METRICS:
            expected = f"{', '.join(METRICS)}, or a precision.{did_you_mean(goal, METRICS)}"
            raise ConfigError(f"thresholds: unknown metric {goal!r:.80}; expected {expected}")
    elif not 0 < goal < 1:
        raise ConfigError(f"thresholds: a precision must be above 0 and below 1, got {goal:g}")
    return goal


def _fit(model: Classifier, task: Task, goals: Mapping[str, Goal], rows: Dataset) -> tuple[dict[str, float], list[str]]:
    """Fit one file's thresholds; a label that has no rows keeps 0.5, a precision that is not reached ends all."""
    logits, fitted, reasons = model.predict_logits(texts_of(rows)), {}, []
    for name, goal in goals.items():
        odds, labels = _binary(task, name, logits, rows, model.folder.temperature)
        try:
            fitted[name] = fit_threshold(odds, labels, goal)
        except NoThresholdError as fault:
            if not isinstance(goal, str):
                raise NoThresholdError(f"{name!r:.80} of {model.folder.file or model.folder.path}: {fault}") from None
            reasons.append(f"{name!r:.80} keeps 0.5: {fault}")
    return fitted, reasons


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
    thresholds: Mapping[str, float],
    *,
    task: Task,
    goals: Mapping[str, Goal],
    rows: Dataset,
) -> FittedModel:
    """Say what the thresholds of a file do on labelled rows."""
    logits, temperature = model.predict_logits(texts_of(rows)), model.folder.temperature
    told = [
        judge_threshold(label, goals.get(label, "f1"), at, *_binary(task, label, logits, rows, temperature))
        for label, at in thresholds.items()
    ]
    labels, groups = label_array(rows), groups_of(rows)
    before, after = (
        score(task, compute_metrics(task, shift_logits(logits, task.label_names, used, temperature), labels, groups))
        for used in ({}, thresholds)
    )
    return FittedModel(name, before, after, tuple(told))


def decide_student(config: Config, layout: ExperimentLayout) -> tuple[str, ...]:
    """Fit thresholds and promise an error rate, as the config says."""
    if layout.decided.exists():  # what an earlier config had done, or what was changed since
        forget_decisions(config, layout)
    notes: list[str] = []
    if config.export.thresholds is not None:
        try:
            notes += fit_thresholds(layout.root, config.export.thresholds).notes
        except (DataError, ConfigError, ModelError) as fault:
            notes.append(f"No thresholds were fitted (export.thresholds): {fault}")
    if config.defer.error is not None:
        wanted = config.defer.model_dump()
        try:
            found = defer_experiment(layout.root, **wanted)
            notes += [f"{model.name}: {model.reason}" for model in found.models if model.reason]
        except KdLoraError as fault:
            notes.append(f"No error rate is promised (defer): {fault}")
    if _wants(config):
        write_text_atomic(layout.decided, _mark(config, layout))
    return tuple(notes)


def is_decided(config: Config, layout: ExperimentLayout) -> bool:
    """Say whether `decide_student` has nothing left to do."""
    if not layout.decided.exists():
        return not _wants(config)
    return layout.decided.read_text(encoding="utf-8", errors="replace") == _mark(config, layout)


def _wants(config: Config) -> bool:
    return config.export.thresholds is not None or config.defer.error is not None


def _mark(config: Config, layout: ExperimentLayout) -> str:
    """Fingerprint what the decisions depend on, and the files that they are in."""
    kept = [place for place in (layout.student, layout.onnx, layout.deferral, layout.thresholds) if place.exists()]
    files = hash_files(layout.root, kept)
    files.pop(f"{layout.student.name}/README.md", None)
    wanted = {"thresholds": config.export.thresholds, "defer": config.defer.model_dump(mode="json")}
    return hash_json({**wanted, "files": files})
