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
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[hub_standin.StandIn, str]]:
    """The stand-in of the Hub, filled, and the address of one of a language model, which speaks the chat protocol."""
    import stand_in_models

    with hub_standin.running() as hub, llm_standin.running() as model:
        stand_in_models.fill(hub, tmp_path_factory.mktemp("models"))
        yield hub, model.url.removesuffix("/v1")


@pytest.fixture
def reader(servers, tmp_path_factory) -> dict[str, str]:
    """The environment of somebody who follows a page."""
    hub, language_model = servers
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = hub_standin.environment(hub, str(cache)) | {"LLM_URL": language_model, "PATH": path, "COLUMNS": "120"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(QUICK), os.environ.get("PYTHONPATH")]))
    own["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of examples that call `datasets` themselves: the counter is elsewhere
    return {**os.environ, **own, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(cache / "ipython")}
