"""Is the language model any good? Its answers against people's labels: chosen on one half, reported on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest

from kdlora.data.tasks import Task
from kdlora.deploy.calibrate import fit_temperature
from kdlora.evidence.metrics import compute_metrics, probabilities, reliability
from kdlora.evidence.stats import Difference, PairedArms, contrast

_LEAST_FITTED = 20


@dataclass(frozen=True)
class PromptScore:
    """How one prompt fares, in percent; a row without an answer counts as wrong."""

    prompt: str
    chosen_on: float  # accuracy on the half that chooses
    accuracy: float  # on the half that is reported, with its 95% interval
    low: float
    high: float
    macro_f1: float | None  # on the answered rows of that half
    unanswered: int  # of both halves
    against_chosen: Difference | None = None  # its accuracy less that of the chosen prompt, paired, on that half


@dataclass(frozen=True)
class Audit:
    """What people's labels say of the answers; calibration errors are 0 to 1.

    Examples:
        >>> audit = summary.audit
    """

    rows: int
    chosen: int  # place of the best prompt
    prompts: tuple[PromptScore, ...]
    label_names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]  # of the reported half: people's label, the model's; last: unanswered
    temperature: float  # fitted on the half that chooses, applied to the table; 1 where that half does not tell
    untempered: str  # why it is 1; empty where it was fitted
    ece_before: float | None  # of the reported half; None where nothing was answered
    ece_after: float | None


def audit_answers(
    task: Task, prompts: Sequence[str], answers: Sequence[np.ndarray], labels: np.ndarray, seed: int
) -> Audit:
    """Choose a prompt and fit a temperature on one half of the rows, and report both on the other half.

    `answers` holds probabilities (rows, labels) of each prompt, NaN where a row has none.
    """
    order = np.random.default_rng([seed, 4]).permutation(len(labels))
    choosing, reported = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    outputs = [_as_logits(table, labels) for table in answers]
    right = [logits.argmax(axis=1) == labels for logits in outputs]
    chosen = int(np.argmax([found[choosing].mean() for found in right]))
    scores, wanted = [], replace(task, metrics=("accuracy", "macro_f1"))
    for place, (prompt, table) in enumerate(zip(prompts, answers, strict=True)):
        missing, good = np.isnan(table).any(axis=1), right[place][reported]
        shown = reported[~missing[reported]]
        interval = binomtest(int(good.sum()), len(reported)).proportion_ci(method="wilson")
        score = PromptScore(
            prompt,
            chosen_on=100 * float(right[place][choosing].mean()),
            accuracy=100 * float(good.mean()),
            low=100 * interval.low,
            high=100 * interval.high,
            macro_f1=100 * compute_metrics(wanted, table[shown], labels[shown])["macro_f1"] if len(shown) else None,
            unanswered=int(missing.sum()),
        )
        if place != chosen:
            pair = PairedArms(task, labels[reported], [outputs[place][reported]], [outputs[chosen][reported]])
            score = replace(score, against_chosen=contrast([pair]))
        scores.append(score)
    best = answers[chosen]
    answered = ~np.isnan(best).any(axis=1)
    fitted, shown = choosing[answered[choosing]], reported[answered[reported]]
    temperature, untempered = 1.0, ""
    if len(fitted) < _LEAST_FITTED:
        untempered = f"only {len(fitted)} rows of the half that chooses were answered"
    elif right[chosen][fitted].all():  # however sure the answers are made, these rows would have them surer
        untempered = f"all {len(fitted)} answered rows of the half that chooses are right"
    else:
        temperature = fit_temperature(np.log(best[fitted]), labels[fitted], "single-label").temperature
    errors = [
        reliability(temper(best[shown], heat), labels[shown], "single-label").error if len(shown) else None
        for heat in (1.0, temperature)
    ]
    said = np.where(answered, np.nan_to_num(best).argmax(axis=1), task.num_labels)
    confusion = np.zeros((task.num_labels, task.num_labels + 1), np.int64)
    np.add.at(confusion, (labels[reported], said[reported]), 1)
    matrix = tuple(tuple(map(int, row)) for row in confusion)
    return Audit(len(labels), chosen, tuple(scores), task.label_names, matrix, temperature, untempered, *errors)


def temper(table: np.ndarray, temperature: float) -> np.ndarray:
    return table if temperature == 1.0 else probabilities(np.log(table), "single-label", temperature)


def _as_logits(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give log-probabilities; a row without an answer gets a label that is wrong."""
    missing = np.isnan(table).any(axis=1)
    wrong = np.eye(table.shape[1])[(labels + 1) % table.shape[1]] + 1e-6
    return np.asarray(np.log(np.where(missing[:, None], wrong, table)))
