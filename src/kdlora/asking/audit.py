"""Is the language model any good? Its answers against people's labels: chosen on one half, reported on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize
from scipy.stats import binomtest

from kdlora.data.tasks import Task
from kdlora.deploy.calibrate import fit_temperature
from kdlora.evidence.metrics import compute_metrics, probabilities, reliability
from kdlora.evidence.stats import Difference, PairedArms, contrast

_LEAST_FITTED, _LEAST_OF_LABEL = 20, 10
_MOST_HEAT, _SPREAD = 3.0, 3.0
"""Bounds of the logarithm of the temperature, and the standard deviation of the biases."""


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
    bias: tuple[float, ...]  # of the labels, in nats, fitted and applied likewise; empty where it was not fitted
    accuracy_after: float  # of the chosen prompt on the reported half, by temperature and bias
    untempered: str  # why it is 1; empty where it was fitted
    ece_before: float | None  # of the reported half; None where nothing was answered
    ece_after: float | None


def audit_answers(
    task: Task, prompts: Sequence[str], answers: Sequence[np.ndarray], labels: np.ndarray, seed: int
) -> Audit:
    """Choose a prompt and fit a temperature and biases on one half of the rows, and report both on the other half.

    `answers` holds probabilities (rows, labels) of each prompt, NaN where a row has none.
    """
    order = np.random.default_rng([seed, 4]).permutation(len(labels))
    choosing, reported = np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])
    outputs = [_as_logits(table, labels) for table in answers]
    right = [logits.argmax(axis=1) == labels for logits in outputs]
    chosen = int(np.argmax([found[choosing].mean() for found in right]))
    scores = []
    for place, (prompt, table) in enumerate(zip(prompts, answers, strict=True)):
        score = _score_prompt(task, prompt, table, labels, right[place], (choosing, reported))
        if place != chosen:
            pair = PairedArms(task, labels[reported], [outputs[place][reported]], [outputs[chosen][reported]])
            score = replace(score, against_chosen=contrast([pair]))
        scores.append(score)
    best = answers[chosen]
    answered = ~np.isnan(best).any(axis=1)
    fitted, shown = choosing[answered[choosing]], reported[answered[reported]]
    temperature, untempered = 1.0, ""
    bias: tuple[float, ...] = ()
    if len(fitted) < _LEAST_FITTED:
        untempered = f"only {len(fitted)} rows of the half that chooses were answered"
    elif right[chosen][fitted].all():  # however sure the answers are made, these rows would have them surer
        untempered = f"all {len(fitted)} answered rows of the half that chooses are right"
    else:
        temperature, bias = _fit(np.log(best[fitted]), labels[fitted])
    after = correct(best, temperature, bias)
    errors = [
        reliability(table[shown], labels[shown], "single-label").error if len(shown) else None
        for table in (best, after)
    ]
    said = np.where(answered, np.nan_to_num(best).argmax(axis=1), task.num_labels)
    confusion = np.zeros((task.num_labels, task.num_labels + 1), np.int64)
    np.add.at(confusion, (labels[reported], said[reported]), 1)
    return Audit(
        rows=len(labels),
        chosen=chosen,
        prompts=tuple(scores),
        label_names=task.label_names,
        confusion=tuple(map(tuple, confusion.tolist())),
        temperature=temperature,
        bias=bias,
        accuracy_after=100 * float((_as_logits(after, labels).argmax(axis=1) == labels)[reported].mean()),
        untempered=untempered,
        ece_before=errors[0],
        ece_after=errors[1],
    )


def _score_prompt(
    task: Task, prompt: str, table: np.ndarray, labels: np.ndarray, right: np.ndarray, halves: tuple[np.ndarray, ...]
) -> PromptScore:
    choosing, reported = halves
    missing, good = np.isnan(table).any(axis=1), right[reported]
    shown = reported[~missing[reported]]
    interval = binomtest(int(good.sum()), len(reported)).proportion_ci(method="wilson")
    wanted = replace(task, metrics=("accuracy", "macro_f1"))
    return PromptScore(
        prompt,
        chosen_on=100 * float(right[choosing].mean()),
        accuracy=100 * float(good.mean()),
        low=100 * interval.low,
        high=100 * interval.high,
        macro_f1=100 * compute_metrics(wanted, table[shown], labels[shown])["macro_f1"] if len(shown) else None,
        unanswered=int(missing.sum()),
    )


def _fit(logits: np.ndarray, labels: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """Fit a temperature, and a bias for each label where every label has rows enough.

    Biases have a normal prior with a standard deviation of 3 nats.

    *Source*: Guo et al., "On Calibration of Modern Neural Networks", section 4.2, with a scalar in place of a vector.
    """
    temperature = fit_temperature(logits, labels, "single-label").temperature
    count = logits.shape[1]
    if np.bincount(labels, minlength=count).min() < _LEAST_OF_LABEL:
        return temperature, ()

    def loss(values: np.ndarray) -> float:
        scaled = logits * np.exp(values[0]) + values[1:]
        wrong = np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(scaled)), labels]
        return float(wrong.sum() + np.square(values[1:] / _SPREAD).sum() / 2)

    start = np.concatenate(([-np.log(temperature)], np.zeros(count)))
    found = minimize(loss, start, method="L-BFGS-B", bounds=[(-_MOST_HEAT, _MOST_HEAT), *[(None, None)] * count])
    return float(np.exp(-found.x[0])), tuple(found.x[1:].tolist())


def correct(table: np.ndarray, temperature: float, bias: Sequence[float]) -> np.ndarray:
    if temperature == 1.0 and not bias:
        return table
    return probabilities(np.log(table) / temperature + (np.asarray(bias) if bias else 0.0), "single-label")


def _as_logits(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Give log-probabilities; a row without an answer gets a label that is wrong."""
    missing = np.isnan(table).any(axis=1)
    wrong = np.eye(table.shape[1])[(labels + 1) % table.shape[1]] + 1e-6
    return np.asarray(np.log(np.where(missing[:, None], wrong, table)))
