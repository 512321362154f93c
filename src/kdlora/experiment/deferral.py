"""Promise an error rate for what an experiment ships, and say how teacher and controls would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from datasets import Dataset

from kdlora.config import Config
from kdlora.configfile import load_config
from kdlora.data.load import Splits, load_examples, load_splits
from kdlora.data.spool import label_array
from kdlora.data.tasks import Task
from kdlora.deploy.decisions import write_decisions
from kdlora.deploy.predict import Classifier, Text
from kdlora.errors import DataError
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
    measure_sureness,
    promise_error,
    risk_coverage,
    tell_apart,
)
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment.deployment import exported_files, texts_of
from kdlora.experiment.scoring import recorded_task
from kdlora.experiment.shipping import write_card
from kdlora.system.storage import write_json_atomic


@dataclass(frozen=True)
class _Judged:
    """One model's outputs on rows that fix the order of thresholds, and on those that test them."""

    logits: tuple[np.ndarray, np.ndarray]
    wrong: tuple[np.ndarray, np.ndarray]
    temperature: float

    @classmethod
    def of(cls, model: Classifier, task: Task, parts: tuple[Dataset, Dataset]) -> _Judged:
        outputs = [model.predict_logits(texts_of(rows)) for rows in parts]
        names = np.array(task.label_names)
        wrong = [
            np.array(model.decide(one)) != names[label_array(rows)] for one, rows in zip(outputs, parts, strict=True)
        ]
        return cls((outputs[0], outputs[1]), (wrong[0], wrong[1]), model.folder.temperature)

    def sure(self, logits: np.ndarray, how: Sureness) -> np.ndarray:
        return measure_sureness(logits, how, self.temperature)

    def promise(self, how: Sureness, error: float, confidence: float) -> Promise:
        other, tested = (self.sure(logits, how) for logits in self.logits)
        return promise_error(
            tested, self.wrong[1], other=(other, self.wrong[0]), error=error, confidence=confidence, how=how
        )

    def describe(self, name: str, how: Sureness, error: float, confidence: float) -> Deferring:
        """Give the model's curve, and what may be promised for it or why nothing may."""
        found = _describe(name, [(self.sure(self.logits[1], how), self.wrong[1])])
        try:
            return replace(found, promise=self.promise(how, error, confidence))
        except NoPromiseError as refusal:
            return replace(found, reason=str(refusal))

    def meet(self, unknown: np.ndarray, error: float, confidence: float) -> tuple[Unknown, ...]:
        """Say what each kind of sureness, at the threshold that it may promise, does with unknown texts."""
        found = []
        for how in SURENESS:
            known, strange = self.sure(self.logits[1], how), self.sure(unknown, how)
            met = Unknown(how, tell_apart(known, strange))
            try:
                promise = self.promise(how, error, confidence)
            except NoPromiseError:
                found.append(met)
                continue
            deferred = float(np.mean(strange < promise.threshold))
            found.append(replace(met, coverage=promise.coverage, deferred=deferred))
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
        ArtifactError: no finished experiment.

    Examples:
        >>> promises = defer_experiment("runs/reviews", data="later.csv")  # doctest: +SKIP
    """
    layout = ExperimentLayout(Path(experiment))
    config, task = load_config(layout.config), recorded_task(layout)
    if task.kind != "single-label":
        raise DataError(f"defer: expected a single-label task, got {task.kind}; only there an answer is right or wrong")
    splits = load_splits(config.task, config.data.model_copy(update={"augment": 0}))
    rows, source = _test_rows(config, task, splits, data)
    rows, known = unseen_rows(splits, rows, source)
    strange = [] if unknown is None else texts_of(load_examples(unknown, task, labelled=False))
    models = []
    for name, model in list(shipped_models(layout)):  # all, before one of them has other decisions
        judged = _Judged.of(model, task, (splits.validation, rows))
        found = judged.describe(name, sureness, error, confidence)
        write_decisions(model.folder, replace(model.decisions, promise=found.promise))
        met = judged.meet(model.predict_logits(strange), error, confidence) if strange else ()
        models.append(replace(found, unknown=met))
    reasons = [model.reason for model in models]
    if data is None:
        models += _arms(layout, set(rows["id"]), sureness)
    deferral = Deferral(error, confidence, sureness, len(rows), known, source, tuple(models), len(strange))
    if strange and layout.teacher.exists():
        deferral = _with_teacher(deferral, config.teacher_arm, layout.teacher, task, (splits.validation, rows), strange)
    write_json_atomic(layout.deferral, asdict(deferral))
    write_card(config, layout)
    if all(reasons):
        raise NoPromiseError(" ".join(dict.fromkeys(reasons)) or f"{layout.root} ships no student")
    return deferral


def _test_rows(config: Config, task: Task, splits: Splits, data: str | None) -> tuple[Dataset, str]:
    """Give the labelled rows that are to promise, and where they come from."""
    if data is not None:
        return load_examples(data, task, id_column=config.data.id_column, labelled=True), str(data)
    if splits.test is None:
        raise DataError(
            "defer: this experiment has no test split, and its validation rows chose the model, so they can promise "
            "nothing; give labelled rows that were not used with --data"
        )
    return splits.test, "the test split"


def unseen_rows(splits: Splits, rows: Dataset, source: str) -> tuple[Dataset, int]:
    """Give the rows whose texts nothing was trained or chosen on, and how many others there were."""
    seen = {*texts_of(splits.train), *texts_of(splits.validation)}
    new = [place for place, text in enumerate(texts_of(rows)) if text not in seen]
    if not new:
        raise DataError(f"all {len(rows)} texts of {source} are in the training or validation split, too")
    return rows.select(new), len(rows) - len(new)


def shipped_models(layout: ExperimentLayout) -> Iterator[tuple[str, Classifier]]:
    """Load what ships, one file after another, to look at all of its answers."""
    for name, file in ({"student": layout.student} | exported_files(layout)).items():
        if file.exists():
            yield name, Classifier.load(file, decisions="thresholds")


def _with_teacher(
    found: Deferral, arm: str, folder: Path, task: Task, parts: tuple[Dataset, Dataset], strange: list[Text]
) -> Deferral:
    """Say how the teacher that was trained here, by that arm, meets unknown texts."""
    model = Classifier.load(folder, decisions="thresholds")
    judged = _Judged.of(model, task, parts)
    alone = _describe(arm, [(judged.sure(judged.logits[1], found.sureness), judged.wrong[1])])
    known = next((one for one in found.models if one.name == arm), alone)
    met = judged.meet(model.predict_logits(strange), found.error, found.confidence)
    others = [one for one in found.models if one.name != arm]
    return replace(found, models=(*others, replace(known, unknown=met)))


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


def _describe(name: str, judged: list[tuple[np.ndarray, np.ndarray]]) -> Deferring:
    curves = []
    for sure, wrong in judged:
        coverage, risk = risk_coverage(sure, wrong)
        curves.append(risk[np.searchsorted(coverage, POINTS - 1e-9)])
    area = float(np.mean([area_under_risk(*one) for one in judged]))
    return Deferring(name, area, tuple(np.mean(curves, axis=0).tolist()))
