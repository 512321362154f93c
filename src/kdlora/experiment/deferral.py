"""What becomes of the answers of what ships: the error rate that is promised; thresholds are in `fitting.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from kdlora.config import Config
from kdlora.data.augment import beginnings
from kdlora.data.load import load_examples
from kdlora.data.spool import label_array, text_columns
from kdlora.data.tasks import Task
from kdlora.deploy.decisions import write_decisions
from kdlora.deploy.predict import Classifier
from kdlora.errors import ConfigError, DataError, KdLoraError, ModelError
from kdlora.evidence.defer import (
    POINTS,
    SURENESS,
    Deferral,
    Deferring,
    NoPromiseError,
    Promise,
    Sureness,
    Unknown,
    area_under_risk,
    check_promise,
    measure_sureness,
    promise_error,
    risk_coverage,
)
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment.deployment import decide_as_run, holds, load_without_copies, texts_of, unseen_rows
from kdlora.experiment.fitting import fit_all, locked, shipped_models
from kdlora.experiment.recording import forget_decisions, model_files, write_card
from kdlora.experiment.scoring import load_labelled, open_finished
from kdlora.report.deferred import tell_refusals
from kdlora.report.shipped import read_part
from kdlora.system.integrity import hash_files, hash_json
from kdlora.system.storage import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Judged:
    """One model's outputs on rows that fix the order of thresholds, and on those that test them."""

    logits: list[np.ndarray]
    wrong: list[np.ndarray]
    temperature: float
    error: float  # that is to be promised
    confidence: float

    @classmethod
    def of(cls, model: Classifier, task: Task, parts: Sequence[Dataset], error: float, confidence: float) -> _Judged:
        outputs, names = [model.predict_logits(texts_of(rows)) for rows in parts], np.array(task.label_names)
        wrong = [
            np.array(model.decide(one)) != names[label_array(rows)] for one, rows in zip(outputs, parts, strict=True)
        ]
        return cls(outputs, wrong, model.folder.temperature, error, confidence)

    def sure(self, logits: np.ndarray, how: Sureness) -> np.ndarray:
        return measure_sureness(logits, how, self.temperature)

    def promise(self, how: Sureness) -> Promise:
        other, tested = (self.sure(logits, how) for logits in self.logits)
        return promise_error(
            tested, self.wrong[1], other=(other, self.wrong[0]), error=self.error, confidence=self.confidence, how=how
        )

    def curve(self, name: str, how: Sureness) -> Deferring:
        return _describe(name, [(self.sure(self.logits[1], how), self.wrong[1])])

    def meet(self, unknown: np.ndarray) -> tuple[Unknown, ...]:
        """Say what each kind of sureness, at the threshold that it may promise, does with unknown texts."""
        from sklearn.metrics import roc_auc_score  # half a second, which no training waits for

        found = []
        for how in SURENESS:
            known, strange = self.sure(self.logits[1], how), self.sure(unknown, how)
            is_known = np.arange(len(known) + len(strange)) < len(known)
            met = Unknown(how, float(roc_auc_score(is_known, np.concatenate([known, strange]))))
            with suppress(NoPromiseError):
                promise = self.promise(how)
                met = replace(met, coverage=promise.coverage, deferred=float(np.mean(strange < promise.threshold)))
            found.append(met)
        return tuple(found)


def defer_experiment(
    experiment: str | Path,
    *,
    data: str | None = None,
    unknown: str | None = None,
    error: float = 0.02,
    confidence: float = 0.95,
    sureness: Sureness = "probability",
) -> Deferral:
    """Find what the shipped student may answer so that at most `error` of its answers are wrong, and keep it there.

    Each file that ships gets a threshold of its own, since int8 moves them. From then on `Classifier` and `predict`
    give no label below it. A file for which nothing can be promised answers everything, as before.

    Args:
        experiment: an experiment's folder.
        data: labelled file, whose rows chose nothing; by default the test split.
        unknown: file of texts of no known class: how many of them would be deferred.
        error: above 0 and below 1.
        confidence: above 0 and below 1.
        sureness: "probability", "margin" or "energy".

    Returns:
        Promises and curves; `defer.json` in the experiment's folder holds them for the report.

    Raises:
        DataError: no rows that chose nothing, a task that is not single-label, rates that are no rates.
        NoPromiseError: for none of the files anything can be promised.
        ArtifactError: no finished experiment, or another process works on it.

    Examples:
        >>> promises = defer_experiment("runs/reviews", data="later.csv")  # doctest: +SKIP
    """
    check_promise(error, confidence, sureness)
    with locked(experiment) as layout:
        return _defer(layout, error, confidence, sureness, data, unknown)


def _defer(
    layout: ExperimentLayout,
    error: float,
    confidence: float,
    sureness: Sureness,
    data: str | None = None,
    unknown: str | None = None,
) -> Deferral:
    _, config, task = open_finished(layout.root)
    splits, source = load_without_copies(config, layout), "the test split" if data is None else str(data)
    given = splits.test if data is None else load_labelled(data, config, task)
    rows, known = unseen_rows(splits, rows_to_promise(task, given), source)
    if repeated := len(rows) - len(set(beginnings(rows, text_columns(rows)))):
        logger.warning("%d of %d rows repeat a text: a promise is of independent rows", repeated, len(rows))
    strange = [] if unknown is None else texts_of(load_examples(unknown, task, labelled=False))
    parts, models, decided = (splits.validation, rows), list[Deferring](), []
    for name, model in shipped_models(layout):
        judged = _Judged.of(model, task, parts, error, confidence)
        found = judged.curve(name, sureness)
        try:
            found = replace(found, promise=judged.promise(sureness))
        except NoPromiseError as refusal:
            found = replace(found, reason=str(refusal))
        decided.append((model.folder, replace(model.decisions, promise=found.promise)))
        models.append(replace(found, unknown=judged.meet(model.predict_logits(strange)) if strange else ()))
    reasons = [model.reason for model in models]
    if data is None:
        models += _arms(layout, set(rows["id"]), sureness)
    if strange and not config.given_teacher and layout.teacher.exists():
        arm, model = config.teacher_arm, Classifier.load(layout.teacher, decisions="thresholds")
        judged = _Judged.of(model, task, parts, error, confidence)
        known_as = next((one for one in models if one.name == arm), None) or judged.curve(arm, sureness)
        models = [one for one in models if one.name != arm]
        models.append(replace(known_as, unknown=judged.meet(model.predict_logits(strange))))
    told = tell_refusals(models) or f"{layout.root} ships no student."
    if all(reasons) and getattr(read_part(layout.deferral, Deferral, "")[0], "promises", False):
        raise NoPromiseError(f"{told} What was promised before stays.")
    deferral = Deferral(error, confidence, sureness, len(rows), known, source, tuple(models), len(strange))
    for folder, decisions in decided:
        write_decisions(folder, decisions)
    write_json_atomic(layout.deferral, asdict(deferral))
    write_card(config, layout)
    if all(reasons):
        raise NoPromiseError(f"{told} Nothing is promised, so every text is answered." if reasons else told)
    return deferral


def rows_to_promise(task: Task, rows: Dataset | None) -> Dataset:
    """Give the rows on which an error rate may be promised, unless there are none, or the task has no such rate."""
    if task.kind != "single-label":
        raise DataError(f"defer: expected a single-label task, got {task.kind}; only there an answer is right or wrong")
    if rows is None:
        raise DataError(
            "defer: there is no test split, and the validation rows chose the model, so they can promise nothing; name "
            "labelled rows that were not used (data.test, or --data of kdlora defer)"
        )
    return rows


def _arms(layout: ExperimentLayout, rows: set[str], sureness: Sureness) -> list[Deferring]:
    """Describe every arm, by the predictions of its runs on these rows of the test split."""
    judged: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for record in read_results(layout.results):
        file = layout.run(record.arm, record.seed).predictions
        if record.status == "finished" and file.exists():
            found = read_predictions(file).only("test")
            kept = np.array([name in rows for name in found.ids], dtype=bool)
            if kept.sum() == len(rows):
                logits = found.logits[kept]
                wrong = logits.argmax(axis=1) != found.labels[kept]
                judged.setdefault(record.arm, []).append((measure_sureness(logits, sureness), wrong))
    return [_describe(arm, runs) for arm, runs in judged.items()]


def _describe(name: str, judged: list[tuple[np.ndarray, np.ndarray]]) -> Deferring:
    found = [risk_coverage(*one) for one in judged]
    curves = [risk[np.searchsorted(coverage, POINTS - 1e-9)] for coverage, risk in found]
    area = float(np.mean([area_under_risk(*one) for one in judged]))
    return Deferring(name, area, tuple(np.mean(curves, axis=0).tolist()))


def decide_student(config: Config, layout: ExperimentLayout) -> tuple[str, ...]:
    """Decide as the config says, in a run, which holds the experiment's lock."""
    notes = []
    if layout.decided.exists():  # what an earlier config had done
        notes = forget_decisions(config, layout)
        decide_as_run(config, layout)
    if config.export.thresholds is not None:
        try:
            notes += fit_all(layout, config.export.thresholds).notes
        except (DataError, ConfigError, ModelError) as fault:
            notes.append(f"No thresholds were fitted (export.thresholds): {fault}")
    if config.defer.error is not None:
        try:
            found = _defer(layout, **config.defer.model_dump())
            notes += [f"{model.name}: {model.reason}" for model in found.models if model.reason]
        except KdLoraError as fault:
            notes.append(f"No error rate is promised (defer): {fault}")
    if (mark := _mark(config, layout)) is not None:
        write_text_atomic(layout.decided, mark)
    return tuple(notes)


def is_decided(config: Config, layout: ExperimentLayout) -> bool:
    mark = _mark(config, layout)
    return not layout.decided.exists() if mark is None else holds(layout.decided, mark)


def _mark(config: Config, layout: ExperimentLayout) -> str | None:
    """Fingerprint what the decisions depend on, and the files that they are in; None where the config asks for none."""
    if config.export.thresholds is None and config.defer.error is None:
        return None
    own = [*model_files(layout.student, layout.onnx), layout.deferral, layout.thresholds]
    wanted = {"thresholds": config.export.thresholds, "defer": config.defer.model_dump(mode="json")}
    return hash_json({**wanted, "files": hash_files(layout.root, own)})
