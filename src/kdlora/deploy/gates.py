"""Hold a stage of an export to the one before it: logits, decisions and score on the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlora.data.tasks import Task
from kdlora.deploy.encode import Text, check_text
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.predict import Classifier, OnnxBackend
from kdlora.errors import DataError
from kdlora.evidence.metrics import check_arrays, compute_metrics, predict_labels, score
from kdlora.evidence.stats import PairedArms, contrast
from kdlora.report.shipped import Parity

if TYPE_CHECKING:
    from kdlora.deploy.torch_backend import TorchBackend

ENOUGH_ROWS = 2_000
"""Where validation has fewer rows, training rows fill up to this many."""
_REGRESSION_SHARE = 0.1
_DRAWS = 2_000
_PROBES = ("a", "one short text", "a longer text of a dozen words or so, with 2 digits!", "long " * 600)


@dataclass(frozen=True)
class Gate:
    """What a stage must hold; a limit of None is not checked.

    Attributes:
        largest_difference: of two logits; for regression, relative to the largest output above 1.
        agreement: least share of equal decisions, 0..1.
        drop: most points that the score may fall.
    """

    largest_difference: float | None = None
    agreement: float | None = None
    drop: float | None = None


@dataclass
class Checks:
    """What every stage of one export is judged on.

    Attributes:
        task: kind and score metrics.
        folder: the transformers folder that is exported.
        texts: the labelled ones first.
        labels: of the first rows, or None.
        groups: of the labelled rows, or None.
        stage: the latest stage that reproduced the model.
        logits: its logits, (rows, labels).
    """

    task: Task
    folder: ModelFolder
    texts: list[Text]
    labels: np.ndarray | None
    groups: Sequence[str] | None
    stage: str
    logits: np.ndarray

    def judge(self, stage: str, file: Path, gate: Gate, *, optimised: bool = True) -> Parity:
        """Run a file on the texts, with the tokenizer beside it, and compare it with the latest fp32 stage."""
        described = replace(self.folder, path=file.parent, backend="onnx", file=file, record={} if optimised else None)
        after = Classifier(described, OnnxBackend(described)).predict_logits(self.texts)
        parity = self._compare(stage, after, gate)
        if parity.passed and gate.largest_difference is not None:
            self.stage, self.logits = stage, after
        return parity

    def _compare(self, stage: str, after: np.ndarray, gate: Gate) -> Parity:
        """Compute the figures of a stage and judge them."""
        difference = float(np.abs(self.logits - after).max())
        agreement = measure_agreement(self.task, self.logits, after)
        own = drop = low = high = None
        if self.labels is not None:
            count = len(self.labels)
            pair = [part[:count] for part in (self.logits, after)]
            before, own = (
                score(self.task, compute_metrics(self.task, part, self.labels, self.groups)) for part in pair
            )
            drop = before - own
            spread = contrast([PairedArms(self.task, self.labels, pair[:1], pair[1:], self.groups)])
            low, high = spread.low, spread.high
        reason = "; ".join(self._faults(gate, difference, agreement, drop))
        return Parity(stage, self.stage, len(after), agreement, difference, own, drop, low, high, reason)

    def _faults(self, gate: Gate, difference: float, agreement: float, drop: float | None) -> list[str]:
        """List the limits that are broken, with the figures."""
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
        return faults


def reference_checks(
    task: Task,
    folder: ModelFolder,
    backend: TorchBackend,
    texts: Sequence[Text],
    labels: Sequence[Any] | np.ndarray | None,
    *,
    groups: Sequence[str] | None = None,
    more_texts: Sequence[Text] = (),
) -> Checks:
    """Run PyTorch on the texts; its logits are what the first stage is compared with."""
    rows = [check_text(text, f"validation text {row}") for row, text in enumerate(texts)]
    wanted = min(len(more_texts), max(0, ENOUGH_ROWS - len(rows)))
    for row in np.linspace(0, len(more_texts) - 1, wanted, dtype=int):
        rows.append(check_text(more_texts[row], f"training text {row}"))
    targets = None if labels is None else np.asarray(labels)
    if targets is not None and (len(targets) != len(texts) or not len(targets)):
        raise DataError(f"expected one label a text, got {len(targets)} labels for {len(texts)} texts.")
    rows = rows or list(_PROBES)
    logits = Classifier(folder, backend, backend.tokenizer_json).predict_logits(rows)
    if targets is not None:
        try:
            check_arrays(task, logits[: len(targets)], targets)
        except ValueError as error:
            raise DataError(f"the labels do not fit the {task.kind} task: {error}") from None
    return Checks(task, folder, rows, targets, groups, "pytorch", logits)


def measure_agreement(task: Task, before: np.ndarray, after: np.ndarray) -> float:
    """Give the share of decisions that are the same."""
    first, second = predict_labels(task, before), predict_labels(task, after)
    if task.kind == "regression":
        # A constant reference leaves no spread to measure by; then only fp32's last digits may differ.
        allowed = max(_REGRESSION_SHARE * float(first.std()), 1e-6 * float(np.abs(first).max()))
        return float((np.abs(first - second) <= allowed).mean())
    return float((first == second).mean())
