"""Hold a stage of an export to the one before it: logits, decisions and score on the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.data.tasks import Task
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.onnx_backend import OnnxBackend
from kdlora.deploy.predict import Backend, Classifier, Text, check_text
from kdlora.errors import DataError
from kdlora.evidence.metrics import compute_metrics, predict_labels, score
from kdlora.evidence.stats import PairedArms, contrast
from kdlora.report.shipped import Parity

ENOUGH_ROWS = 2_000
"""Where validation has fewer rows, training rows fill up to this many."""
_REGRESSION_SHARE = 0.1
_PROBES = ("a", "one short text", "a longer text of a dozen words or so, with 2 digits!", "long " * 600)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to judge a model on, and what is right for them.

    Attributes:
        texts: texts, or pairs as tuples.
        labels: label index, value or 0/1 row of each text; without them no score is computed.
        task: columns and score metrics.
        groups: group of each text (MNLI).
    """

    texts: Sequence[Text]
    labels: Sequence[Any] | np.ndarray | None = None
    task: Task | None = None
    groups: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and (len(self.labels) != len(self.texts) or not len(self.labels)):
            raise DataError(f"expected one label a text, got {len(self.labels)} labels for {len(self.texts)} texts.")

    def checked_texts(self, noun: str) -> list[Text]:
        """Give the texts; an empty one is refused by its row."""
        return [check_text(text, f"{noun} {row}") for row, text in enumerate(self.texts)]

    def score(self, task: Task, logits: np.ndarray) -> float:
        """Score the logits of the labelled texts, 0..100."""
        try:
            return score(task, compute_metrics(task, logits, np.asarray(self.labels), self.groups))
        except ValueError as error:
            raise DataError(f"the labels do not fit the {task.kind} task: {error}") from None


@dataclass(frozen=True)
class Gate:
    """What a stage must hold; a limit of None is not checked."""

    largest_difference: float | None = None  # of two logits; for regression, relative to the largest output above 1
    agreement: float | None = None  # least share of equal decisions, 0..1
    drop: float | None = None  # most points that the score may fall


class Checks:
    """What every stage of one export is judged on: texts, and the logits of the latest stage that held."""

    def __init__(
        self, task: Task, folder: ModelFolder, backend: Backend, given: LabelledTexts, more_texts: Sequence[Text]
    ) -> None:
        """Run PyTorch on the texts; its logits are what the first stage is compared with."""
        self.task, self.folder, self.given = task, folder, given
        self.stages: list[Parity] = []  # that held
        self.attempts: list[Parity] = []  # that did not
        self.texts = given.checked_texts("validation text")
        wanted = min(len(more_texts), max(0, ENOUGH_ROWS - len(self.texts)))
        for row in np.linspace(0, len(more_texts) - 1, wanted, dtype=int):
            self.texts.append(check_text(more_texts[row], f"training text {row}"))
        self.texts = self.texts or list(_PROBES)
        self.stage, self.classifier = "pytorch", Classifier(folder, backend)
        self.logits = self.classifier.predict_logits(self.texts)
        self.score = None if given.labels is None else self._score(self.logits)

    def judge(self, stage: str, file: Path, gate: Gate, *, optimised: bool = True) -> Parity:
        """Run a file on the texts, with the tokenizer beside it, and compare it with the latest fp32 stage."""
        described = replace(self.folder, path=file.parent, file=file, record={} if optimised else None)
        classifier = Classifier(described, OnnxBackend(described))
        after = classifier.predict_logits(self.texts)
        parity = self._compare(stage, after, gate)
        (self.stages if parity.passed else self.attempts).append(parity)
        if parity.passed and gate.largest_difference is not None:
            self.stage, self.classifier, self.logits, self.score = stage, classifier, after, parity.score
        return parity

    def _compare(self, stage: str, after: np.ndarray, gate: Gate) -> Parity:
        """Measure a stage, and list the limits that it breaks."""
        difference = float(np.abs(self.logits - after).max())
        agreement = measure_agreement(self.task, self.logits, after)
        own = drop = low = high = None
        if self.score is not None:
            own = self._score(after)
            drop = self.score - own
            labels = np.asarray(self.given.labels)
            pair = [part[: len(labels)] for part in (self.logits, after)]
            spread = contrast([PairedArms(self.task, labels, pair[:1], pair[1:], self.given.groups)])
            low, high = spread.low, spread.high
        faults = []
        if gate.largest_difference is not None:
            values = self.task.kind == "regression"
            allowed = gate.largest_difference * (max(1.0, float(np.abs(self.logits).max())) if values else 1.0)
            if not difference <= allowed:
                faults.append(f"logits differ by {difference:.2e}, more than {allowed:.1e}")
        if gate.agreement is not None and not agreement >= gate.agreement:
            faults.append(f"{agreement:.2%} of predictions agree, fewer than {gate.agreement:.2%}")
        if gate.drop is not None and drop is not None and not drop <= gate.drop:
            faults.append(f"the score falls by {drop:.2f} points, more than {gate.drop:.2f}")
        return Parity(stage, self.stage, len(after), agreement, difference, own, drop, low, high, "; ".join(faults))

    def _score(self, logits: np.ndarray) -> float:
        return self.given.score(self.task, logits[: len(self.given.texts)])


def measure_agreement(task: Task, before: np.ndarray, after: np.ndarray) -> float:
    """Give the share of decisions that are the same."""
    first, second = predict_labels(task, before), predict_labels(task, after)
    if task.kind == "regression":
        # A constant reference leaves no spread to measure by; then only fp32's last digits may differ.
        allowed = max(_REGRESSION_SHARE * float(first.std()), 1e-6 * float(np.abs(first).max()))
        return float((np.abs(first - second) <= allowed).mean())
    return float((first == second).mean())
