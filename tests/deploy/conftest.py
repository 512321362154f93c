"""Classifiers and exports that the tests of this room share; do not change them, copy them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from deploy_folders import TEXTS, build_classifier


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`classifier_folder(family="bert", kind="single-label")` gives a transformers folder."""
    root = tmp_path_factory.mktemp("classifiers")
    built: dict[tuple[str, str], Path] = {}

    def folder(family: str = "bert", kind: str = "single-label") -> Path:
        key = (family, kind)
        if key not in built:
            built[key] = build_classifier(family, root / "-".join(key), kind=kind)
        return built[key]

    return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, classifier_folder) -> Callable[..., Path]:
    """`exported(family="bert", kind="single-label")` gives an ONNX folder with both formats."""
    from kdlora.deploy.export import export_onnx
    from kdlora.deploy.predict import Classifier

    root = tmp_path_factory.mktemp("exports")
    built: dict[tuple[str, str], Path] = {}

    def folder(family: str = "bert", kind: str = "single-label") -> Path:
        key = (family, kind)
        if key not in built:
            source = classifier_folder(family, kind)
            logits = Classifier.load(source).predict_logits(TEXTS)
            labels = {"single-label": logits.argmax(1), "regression": logits[:, 0]}.get(kind, (logits > 0).astype(int))
            # A random model decides closer calls than a trained one: the gate is wide here, and tested elsewhere.
            built[key] = export_onnx(
                source,
                root / "-".join(key),
                texts=TEXTS,
                labels=np.asarray(labels),
                min_agreement=0.5,
                max_metric_drop=50,
            ).folder
        return built[key]

    return folder
