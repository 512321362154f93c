"""No process of the suite reaches the network, and none is asked to where the config names files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's own trespasses are noted, in place of the suite's."""
    path = tmp_path / "network.log"
    monkeypatch.setenv("KDLORA_TESTS_NETWORK_LOG", str(path))
    return path


CALLS = [
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1),
    lambda: socket.getaddrinfo("huggingface.co", 443),
    lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
]


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
@pytest.mark.parametrize("call", CALLS)
def test_the_guard_holds(log, call):
    """A guard that lets everything through proves nothing about the code behind it."""
    with pytest.raises(RuntimeError, match="asked the network"):
        call()
    assert "192.0.2.1" in log.read_text() or "huggingface.co" in log.read_text()


def test_this_machine_may_be_asked(log):
    """Tests serve pages to a browser, and files to the Hub's client, on the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    assert not log.exists()
    assert os.environ["HF_HUB_OFFLINE"] == "1"

    # Trainings run in processes of their own, which the test cannot see into.
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "asked the network" in done.stderr
    assert "192.0.2.1" in log.read_text()
