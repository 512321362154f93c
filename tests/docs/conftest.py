"""A Hub with tiny models under their real names, a language model that answers, an environment that sees both."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hub_standin
import llm_standin

QUICK = Path(__file__).with_name("quick")


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_standin.StandIn]:
    """The stand-in, filled."""
    import stand_in_models

    with hub_standin.running() as server:
        stand_in_models.fill(server, tmp_path_factory.mktemp("models"))
        yield server


@pytest.fixture(scope="session")
def language_model() -> Iterator[str]:
    """The address of a server that speaks the chat protocol."""
    with llm_standin.running() as model:
        yield model.url.removesuffix("/v1")


@pytest.fixture
def reader(hub, language_model, tmp_path_factory) -> dict[str, str]:
    """The environment of somebody who follows a page."""
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = hub_standin.environment(hub, str(cache)) | {"LLM_URL": language_model, "PATH": path, "COLUMNS": "120"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(QUICK), os.environ.get("PYTHONPATH")]))
    own["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of examples that call `datasets` themselves: the counter is elsewhere
    return {**os.environ, **own, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(cache / "ipython")}
