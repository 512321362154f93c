"""`kdlora doctor`: what a bug report says about the installation."""

import json
import socket
from importlib import metadata
from pathlib import Path

import pytest

from kdlora import doctor

pytest_plugins = ["experiment_fixtures"]


def test_it_names_what_is_installed_and_what_is_missing(monkeypatch):
    """An extra reported as complete although a package of it is too old or absent."""
    declared = ["numpy>=1.26", "transformers>=99", "nowhere>=1; extra == 'ray'", "onnx>=1; extra == 'onnx'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor.metadata.metadata("kdlora").__class__, "get_all", lambda self, key: ["ray", "onnx"])
    base, extras = doctor.unmet_requirements()
    assert base == (f"transformers>=99 ({metadata.version('transformers')} is installed)",)
    assert extras == {"onnx": (), "ray": ("nowhere>=1 (not installed)",)}


def test_the_report_carries_nothing_private(cli, monkeypatch):
    """People paste this into public issues: no host name, no user's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = cli("doctor")
    text = shown.out
    for part in ("torch 2", "device", "CPU threads", "memory", "HF_HUB_OFFLINE is set", "extra trackers"):
        assert part in text
    assert str(Path.home()) not in text.replace("/root", "") or str(Path.home()) == "/"
    assert socket.gethostname() not in text


def test_json_for_programs_and_exit_code_1_for_problems(cli, monkeypatch):
    """A check in CI must fail where a requirement is not met."""
    monkeypatch.setattr(doctor, "unmet_requirements", lambda: (("peft>=99 (0.1 is installed)",), {}))
    shown = cli("doctor", "--json")
    assert shown.code == 1
    assert json.loads(shown.out)["problems"] == ["peft>=99 (0.1 is installed) is not met"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "hub.example"])
def test_a_hub_that_does_not_answer_is_no_crash(monkeypatch, endpoint):
    """Behind a firewall the doctor is needed most."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    said = doctor.diagnose(hub_seconds=0.5).hub
    assert "cannot be reached" in said or "which is no address" in said
