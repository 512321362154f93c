"""Temperature scaling: what it recovers, what it leaves alone, what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from deploy_folders import TEXTS
from kdlora.deploy.calibrate import fit_temperature, save_temperature
from kdlora.deploy.export import export_onnx
from kdlora.deploy.predict import Classifier
from kdlora.errors import DataError, ModelError
from kdlora.evidence.metrics import probabilities


@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
@pytest.mark.parametrize("factor", [0.4, 1.0, 3.0])
def test_recovers_a_known_temperature(kind, factor):
    """Prevents a fit that stops at a bound, or that multiplies where it should divide."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 3))
    table = probabilities(logits, kind)
    if kind == "multi-label":
        labels = (draw.random(table.shape) < table).astype(int)
    else:
        labels = (draw.random((len(table), 1)) > table.cumsum(axis=1)).sum(axis=1)
    found = fit_temperature(logits * factor, labels, kind)
    assert found.temperature == pytest.approx(factor, rel=0.05)
    assert found.nll_after <= found.nll_before + 1e-9
    assert found.ece_after < 0.02
    if factor == 3.0:
        assert found.ece_before > 3 * found.ece_after


@pytest.mark.usefixtures("traced_once")
def test_saved_temperature_is_exported_and_applied(tmp_path, classifier_folder):
    """Prevents a calibrated student whose export is not calibrated."""
    folder = shutil.copytree(classifier_folder(), tmp_path / "model")
    save_temperature(folder, 2.5)
    result = export_onnx(folder, tmp_path / "out", formats=("onnx",))
    assert result.temperature == 2.5
    model = Classifier.load(tmp_path / "out")
    expected = probabilities(model.predict_logits(TEXTS[:1]), "single-label", 2.5)[0]
    assert list(model.predict(TEXTS[:1])[0].probabilities.values()) == pytest.approx(expected.tolist())
    save_temperature(tmp_path / "out", 1.0)
    assert Classifier.load(tmp_path / "out").folder.temperature == 1
    assert json.loads((tmp_path / "out" / "kdlora_export.json").read_text())["temperature"] == 1


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (np.zeros((30, 1)), np.zeros(30), "regression", "nothing to calibrate"),
        (np.zeros((30, 2)), np.zeros(29, int), "single-label", r"labels of shape \(30,\)"),
        (np.zeros((30, 2)), np.zeros(30, int), "multi-label", r"labels of shape \(30, 2\)"),
        (np.zeros((5, 2)), np.zeros(5, int), "single-label", "at least 20 validation rows"),
        (np.full((30, 2), np.nan), np.zeros(30, int), "single-label", "not finite"),
    ],
)
def test_what_cannot_be_calibrated(logits, labels, kind, message):
    """Prevents a temperature fitted on nonsense."""
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, labels, kind)


def test_bad_temperature_is_not_saved(tmp_path):
    """Prevents a folder that can no longer be loaded."""
    with pytest.raises(ModelError, match="positive number, got -1"):
        save_temperature(tmp_path, -1)
    with pytest.raises(ModelError, match="not a model folder"):
        save_temperature(tmp_path, 2.0)
