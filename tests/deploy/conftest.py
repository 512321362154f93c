"""Classifiers and exports that the tests of this room share; do not change them, copy them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deploy_folders import LABELS, TEXTS, build_classifier
from experiments import edit_json
from kdlora.data.tasks import Task


@pytest.fixture(scope="session")
def classifier_folder(made_once) -> Callable[..., Path]:
    """`classifier_folder(family="bert", kind="single-label")` gives a transformers folder."""

    def give(family: str = "bert", kind: str = "single-label") -> Path:
        return made_once(
            f"classifier-{family}-{kind}", lambda folder: build_classifier(family, folder / "model", kind=kind)
        )

    return give


@pytest.fixture(scope="session")
def exported(made_once, classifier_folder) -> Callable[..., Path]:
    """`exported(family="bert", kind="single-label")` gives an ONNX folder with both formats."""

    def give(family: str = "bert", kind: str = "single-label") -> Path:
        source = classifier_folder(family, kind)
        return made_once(f"export-{family}-{kind}", lambda folder: _export(source, folder / "onnx", kind))

    return give


@pytest.fixture
def trained_on(classifier_folder, tmp_path: Path) -> Callable[..., Path]:
    """`trained_on("premise", "hypothesis")` gives a classifier whose training noted these columns of its text."""

    def give(*columns: str) -> Path:
        folder = shutil.copytree(classifier_folder(), tmp_path / "-".join(columns))
        task = Task("single-label", columns, ("label",), LABELS["single-label"], ("accuracy",))
        edit_json(folder / "config.json", kdlora_task=task.to_dict())
        return folder

    return give


@pytest.fixture
def traced_once(made_once, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace a model once in a session, for tests of what comes after: the trace is nearly all of an export."""
    from kdlora.deploy import graph
    from kdlora.distil.inference import hash_model
    from kdlora.system.integrity import hash_json

    capture = graph.capture

    def copy(model, names, to: Path) -> None:
        def make(folder: Path) -> Path:
            capture(model, names, folder / "captured.onnx")
            return folder / "captured.onnx"

        shutil.copyfile(made_once(f"trace-{hash_json([hash_model(model), list(names)])}", make), to)

    monkeypatch.setattr(graph, "capture", copy)


def _export(source: Path, folder: Path, kind: str) -> Path:
    from kdlora.deploy.export import export_onnx
    from kdlora.deploy.gates import LabelledTexts
    from kdlora.deploy.predict import Classifier

    if kind == "tokens":
        return export_onnx(source, folder, texts=TEXTS, min_agreement=0.5).folder
    logits = Classifier.load(source).predict_logits(TEXTS)
    labels = {"single-label": logits.argmax(1), "regression": logits[:, 0]}.get(kind, (logits > 0).astype(int))
    # A random model decides closer calls than a trained one: the gate is wide here, and tested elsewhere.
    given = LabelledTexts(TEXTS, np.asarray(labels))
    return export_onnx(source, folder, texts=given, min_agreement=0.5, max_metric_drop=50).folder
