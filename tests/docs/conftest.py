"""A Hub with tiny models under their real names, a language model that answers, an environment that sees both."""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import hub_standin


class _LanguageModel(BaseHTTPRequestHandler):
    """Answers completions with the log-probabilities of two words."""

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        bad = any(word in question["prompt"] for word in ("broken", "late", "rude"))
        likely = {" complaint": math.log(0.9 if bad else 0.2), " praise": math.log(0.1 if bad else 0.8)}
        body = json.dumps({"choices": [{"logprobs": {"top_logprobs": [likely]}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        return


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hub_standin.StandIn]:
    """The stand-in, filled."""
    import stand_in_models

    with hub_standin.running() as server:
        stand_in_models.fill(server, tmp_path_factory.mktemp("models"))
        yield server


@pytest.fixture(scope="session")
def language_model() -> Iterator[str]:
    """The address of a server that speaks the completions protocol."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _LanguageModel) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture
def reader(hub, language_model, tmp_path_factory) -> dict[str, str]:
    """The environment of somebody who follows a page."""
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = hub_standin.environment(hub, str(cache)) | {"LLM_URL": language_model, "PATH": path, "COLUMNS": "120"}
    own["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of examples that call `datasets` themselves: the counter is elsewhere
    return {**os.environ, **own, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(cache / "ipython")}
