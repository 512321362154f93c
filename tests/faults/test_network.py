"""No process of the suite reaches the network, and none is asked to where the config names files."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

QUICK = Path(__file__).parents[1] / "docs" / "quick"


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
def test_the_guard_holds_here_and_in_children_and_lets_this_machine_be_asked(tmp_path, monkeypatch):
    """A guard that lets everything through proves nothing about the code behind it; the loopback serves pages."""
    log = tmp_path / "network.log"  # of this test's own trespasses, in place of the suite's
    monkeypatch.setenv("KDLORA_TESTS_NETWORK_LOG", str(log))
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    assert not log.exists()
    for call in (
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=0.1),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 53)),
    ):
        with pytest.raises(RuntimeError, match="asked the network"):
            call()
    assert log.read_text().count("\n") == 3
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=0.1)"
    for path in ("", f"{QUICK}{os.pathsep}"):  # where pages are tried, another file of that name stands first
        own = os.environ | {"PYTHONPATH": path + os.environ["PYTHONPATH"]}
        done = subprocess.run([sys.executable, "-c", code], env=own, capture_output=True, text=True, check=False)
        assert "asked the network" in done.stderr
