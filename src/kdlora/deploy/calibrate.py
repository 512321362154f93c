"""Temperature scaling: one number, fitted on validation data, that makes probabilities mean what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar

from kdlora.deploy.folder import CONFIG_FILE, TEMPERATURE_KEY
from kdlora.errors import DataError
from kdlora.evidence.metrics import probabilities, reliability
from kdlora.foreign import read_json
from kdlora.report.shipped import Calibration
from kdlora.system.storage import write_json_atomic

_RANGE = (0.05, 20.0)
_LEAST_ROWS = 20


def fit_temperature(logits: np.ndarray, labels: np.ndarray, kind: str) -> Calibration:
    """Fit the temperature by maximum likelihood; predictions keep their order, probabilities change.

    Where every row is right the temperature is 1: however sure the model is made, these rows would have it surer.

    Args:
        logits: (rows, labels), of validation data that the model was not trained on.
        labels: int (rows,), or 0/1 (rows, labels) for multi-label.
        kind: "single-label" or "multi-label".

    Returns:
        The temperature, and likelihood and calibration error before and after.

    Raises:
        DataError: regression, too few rows, or labels that do not fit.

    *Source*: Guo et al., "On Calibration of Modern Neural Networks", sections 4.2 and 2.

    Examples:
        >>> logits = np.array([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0]] * 20)
        >>> fit_temperature(logits, np.array([0, 1, 1] * 20), "single-label").temperature > 1  # too sure of a third
        True
    """
    if kind not in ("single-label", "multi-label"):
        raise DataError(f"a {kind} model gives no probabilities, there is nothing to calibrate.")
    targets = np.asarray(labels)
    wanted = logits.shape if kind == "multi-label" else logits.shape[:1]
    if targets.shape != wanted:
        raise DataError(f"expected labels of shape {wanted} for logits of shape {logits.shape}, got {targets.shape}.")
    known = np.arange(2 if kind == "multi-label" else logits.shape[1])
    if len(strange := targets[~np.isin(targets, known)]):
        raise DataError(f"expected labels of 0 to {known[-1]}, got {strange[0]}.")
    if len(logits) < _LEAST_ROWS:
        raise DataError(f"expected at least {_LEAST_ROWS} validation rows to fit a temperature on, got {len(logits)}.")
    if not np.isfinite(logits).all():
        raise DataError("the logits to calibrate hold values that are not finite.")

    is_right = (logits > 0) == targets if kind == "multi-label" else logits.argmax(axis=1) == targets

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        if kind == "multi-label":
            return float(np.mean(np.logaddexp(0.0, scaled) - scaled * targets))
        return float(np.mean(np.logaddexp.reduce(scaled, axis=1) - scaled[np.arange(len(scaled)), targets]))

    # In the logarithm the search is symmetric: a model can be half as sure as it should be, or twice.
    found = minimize_scalar(loss, bounds=tuple(np.log(_RANGE)), method="bounded", options={"xatol": 1e-4})
    best = 0.0 if is_right.all() else float(found.x)
    temperature = float(np.exp(best))
    before, after = (reliability(probabilities(logits, kind, at), targets, kind).error for at in (1.0, temperature))
    return Calibration(temperature, len(logits), loss(0.0), loss(best), ece_before=before, ece_after=after)


def save_temperature(folder: Path, temperature: float) -> None:
    """Write a temperature into a PyTorch folder's config.json, where `Classifier` and an export find it."""
    path = folder / CONFIG_FILE
    config = {key: value for key, value in read_json(path).items() if key != TEMPERATURE_KEY}
    if temperature != 1:
        config[TEMPERATURE_KEY] = float(temperature)
    write_json_atomic(path, config)
