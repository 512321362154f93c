"""A model folder, and one of a stranger's, whose graph is not there yet, or is good."""

from pathlib import Path

import graphs
import pytest

from deploy_folders import build_classifier


@pytest.fixture
def graph_folder(tmp_path: Path) -> Path:
    """A folder of a stranger's, with everything but the graph."""
    return graphs.build_folder(tmp_path / "stranger" / "model")


@pytest.fixture
def served(graph_folder: Path) -> Path:
    """The same with a good graph."""
    graphs.build_graph(graph_folder / "model.onnx")
    return graph_folder


@pytest.fixture(scope="session")
def classifier(made_once) -> Path:
    """A whole model folder; read only."""
    return made_once("classifier-bert-single-label", lambda place: build_classifier("bert", place / "model"))
