"""Promise an error rate for what an experiment ships, and say how teacher and controls would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from datasets import Dataset

from kdlora.config import Config
from kdlora.configfile import load_config
from kdlora.data.load import load_examples, load_splits
from kdlora.data.spool import label_array
from kdlora.data.tasks import Task
from kdlora.deploy.predict import Classifier
from kdlora.deploy.promises import write_promise
from kdlora.errors import DataError
from kdlora.evidence.defer import (
    POINTS,
    Deferral,
    Deferring,
    NoPromiseError,
    Promise,
    Sureness,
    area_under_risk,
    measure_sureness,
    promise_error,
    risk_coverage,
)
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment.deployment import texts_of
from kdlora.experiment.scoring import recorded_task
from kdlora.system.storage import write_json_atomic


def defer_experiment(
    experiment: str | Path,
    *,
    data: str | None = None,
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
        error: above 0 and below 1.
        confidence: above 0 and below 1.
        sureness: "probability", "margin" or "energy".

    Returns:
        Promises and curves; `defer.json` in the experiment's folder holds them for the report.

    Raises:
        DataError: no rows that chose nothing, a task that is not single-label, rates that are no rates.
        NoPromiseError: for none of the files anything can be promised.
        ArtifactError: no finished experiment.
    """
    layout = ExperimentLayout(Path(experiment))
    config, task = load_config(layout.config), recorded_task(layout)
    if task.kind != "single-label":
        raise DataError(
            f"defer: expected a single-label task, got {task.kind}; only there an answer is right or wrong."
        )
    other, rows, known, source = _rows(config, task, data)
    models = []
    for name, classifier in _shipped(layout):
        seen, tested = (_judge(classifier, part, sureness) for part in (other, rows))
        promise, reason = None, ""
        try:
            promise = promise_error(*tested, other=seen, error=error, confidence=confidence, how=sureness)
        except NoPromiseError as refusal:
            reason = str(refusal)
        write_promise(classifier.folder, promise)
        models.append(_describe(name, [tested], promise, reason))
    reasons = [model.reason for model in models]
    if data is None:
        models += _arms(layout, set(rows["id"]), sureness)
    found = Deferral(error, confidence, sureness, len(rows), known, source, tuple(models))
    write_json_atomic(layout.deferral, asdict(found))
    if all(reasons):
        raise NoPromiseError("; ".join(dict.fromkeys(reasons)) or f"{layout.root} ships no student")
    return found


def _rows(config: Config, task: Task, data: str | None) -> tuple[Dataset, Dataset, int, str]:
    """Give the rows that fix the order of the thresholds, those that test them, how many were known, and the source."""
    splits = load_splits(config.task, config.data.model_copy(update={"augment": 0}))
    rows, source = splits.test, "the test split"
    if data is not None:
        rows, source = load_examples(data, task, id_column=config.data.id_column, labelled=True), str(data)
    if rows is None:
        raise DataError(
            "defer: this experiment has no test split, and its validation rows chose the model, so they can promise "
            "nothing; give labelled rows that were not used with --data"
        )
    seen = {*texts_of(splits.train), *texts_of(splits.validation)}
    new = [place for place, text in enumerate(texts_of(rows)) if text not in seen]
    if not new:
        raise DataError(f"defer: all {len(rows)} texts of {source} are in the training or validation split, too")
    return splits.validation, rows.select(new), len(rows) - len(new), source


def _shipped(layout: ExperimentLayout) -> Iterator[tuple[str, Classifier]]:
    files = {
        "student": layout.student,
        "student, ONNX": layout.onnx / "model.onnx",
        "student, int8": layout.onnx / "model_quantized.onnx",
    }
    for name, file in files.items():
        if file.exists():
            yield name, Classifier.load(file, defer=False)


def _judge(classifier: Classifier, rows: Dataset, sureness: Sureness) -> tuple[np.ndarray, np.ndarray]:
    """Say of every row how sure the model is, and whether it is wrong."""
    logits = classifier.predict_logits(texts_of(rows))
    return (
        measure_sureness(logits, sureness, classifier.folder.temperature),
        logits.argmax(axis=1) != label_array(rows),
    )


def _arms(layout: ExperimentLayout, rows: set[str], sureness: Sureness) -> list[Deferring]:
    """Describe every arm, by the predictions of its runs on these rows of the test split."""
    judged: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for record in read_results(layout.results):
        file = layout.run(record.arm, record.seed).predictions
        if record.status == "finished" and file.exists():
            found = read_predictions(file).only("test")
            kept = np.array([name in rows for name in found.ids], dtype=bool)
            if found.labels is not None and kept.sum() == len(rows):
                logits = found.logits[kept]
                wrong = logits.argmax(axis=1) != found.labels[kept]
                judged.setdefault(record.arm, []).append((measure_sureness(logits, sureness), wrong))
    return [_describe(arm, runs) for arm, runs in judged.items()]


def _describe(
    name: str, judged: list[tuple[np.ndarray, np.ndarray]], promise: Promise | None = None, reason: str = ""
) -> Deferring:
    curves = []
    for sure, wrong in judged:
        coverage, risk = risk_coverage(sure, wrong)
        curves.append(risk[np.searchsorted(coverage, POINTS - 1e-9)])
    area = float(np.mean([area_under_risk(*one) for one in judged]))
    return Deferring(name, area, tuple(np.mean(curves, axis=0).tolist()), promise, reason)
