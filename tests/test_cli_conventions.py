"""What people and programs expect of every verb: help, JSON, completion, no colours; and what the doctor says."""

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import typer

from kdlora import doctor
from kdlora.cli import app

COMMANDS = typer.main.get_command(app).commands
VERBS = sorted(COMMANDS)


def shell(*arguments, **environment):
    """Call the command line in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "kdlora", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120", **environment}
    )


def test_a_label_that_a_terminal_cannot_show_ends_no_command(tmp_path):
    """After hours of training a traceback would stand in place of the table, for one sign's sake."""
    pty = pytest.importorskip("pty")
    mine, terminal = pty.openpty()
    config = tmp_path / "config.yaml"
    config.write_text("{family: bert, task: {label: Größe ✓}, data: {train: a.csv}}", encoding="utf-8")
    command, own = [sys.executable, "-m", "kdlora", "validate", str(config)], {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(command, env=os.environ | own, stdout=terminal, stderr=subprocess.PIPE, check=False)
    os.close(terminal)
    assert done.returncode == 0, done.stderr.decode()
    assert "Größe \\u2713" in os.read(mine, 65536).decode("cp1252")
    os.close(mine)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_example_and_json(verb):
    """A verb that was added without them: its users read the source, and programs parse its tables."""
    command = COMMANDS[verb]
    assert f"Example: kdlora {verb}" in command.help
    assert "--json" in {option for parameter in command.params for option in parameter.opts}
    assert all(parameter.help for parameter in command.params)
    assert "2 a mistake in the command" in app.info.epilog, "scripts branch on the exit codes"


def test_reference_and_validate_print_json(cli, tmp_path):
    """Programs read names and settings from here; a table in between breaks them."""
    tasks, families = json.loads(cli("tasks", "--json").out), json.loads(cli("families", "--json").out)
    assert tasks["mrpc"]["label_names"] == ["not_equivalent", "equivalent"]
    assert families["bert"] == {"teacher": "bert-base-uncased", "student": "distilbert-base-uncased"}
    path = tmp_path / "config.yaml"
    path.write_text("{family: bert, task: {name: mrpc}, data: {path: nyu-mll/glue}}")
    assert json.loads(cli("validate", path, "--json").out)["lora"]["rank"] == 16


def test_predict_report_and_compare_print_json(cli, experiment, tmp_path):
    """The places of what was written, for the next program."""
    rows = tmp_path / "rows.csv"
    rows.write_text("text\nwhat a wonderful film\nwhat a dreadful film\n")
    done = cli("predict", experiment.layout.student, rows, "--to", tmp_path / "labelled.csv", "--json")
    assert json.loads(done.out)["rows"] == 2, done.err
    report = json.loads(cli("report", experiment.folder, "--out", tmp_path, "--json").out)
    assert [path.split("/")[-1] for path in report["paths"]] == ["report.md", "report.html"]
    compared = json.loads(cli("compare", experiment.folder, "--out", tmp_path, "--json").out)
    assert [path.split("/")[-1] for path in compared["paths"]] == ["compare.md", "compare.html"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("kdlora r", {"run", "report"}),
        ("kdlora run --task mr", {"mrpc"}),
        ("kdlora run --set student.train.learn", {"student.train.learning_rate="}),
        ("kdlora export x --format onnx-", {"onnx-int8"}),
    ],
)
def test_the_shell_completes_verbs_names_and_keys(words, wanted):
    """Completion that fails does so without a word: the shell offers files instead."""
    number = str(len(words.split()) - 1)
    done = shell(_KDLORA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert wanted <= set(done.stdout.split()), done.stderr


def test_no_colour_where_it_is_not_wanted():
    """Escape codes in a log, or for a reader who switched them off."""
    assert "\x1b[" in shell("tasks", FORCE_COLOR="1").stdout
    assert "\x1b[3" not in shell("--help", FORCE_COLOR="1", NO_COLOR="1").stdout
    assert re.fullmatch(r"kdlora \d+\.\d+\.\d+\S*\n", shell("--version", FORCE_COLOR="1", NO_COLOR="1").stdout)


def test_it_names_what_is_installed_and_what_is_missing(monkeypatch):
    """An extra reported as complete although a package of it is too old or absent."""
    declared = ["numpy>=1.26", "transformers>=99", "nowhere>=1; extra == 'ray'", "onnx>=1; extra == 'onnx'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: declared)
    monkeypatch.setattr(doctor.metadata.metadata("kdlora").__class__, "get_all", lambda self, key: ["ray", "onnx"])
    base, extras = doctor.unmet_requirements()
    assert base == (f"transformers>=99 ({metadata.version('transformers')} is installed)",)
    assert extras == {"onnx": (), "ray": ("nowhere>=1 (not installed)",)}


def test_the_report_carries_nothing_private_and_problems_have_exit_code_1(cli, monkeypatch):
    """People paste this into public issues: no host name, no user's folder. A check in CI must fail."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = cli("doctor").out
    for part in ("torch 2", "device", "CPU threads", "memory", "HF_HUB_OFFLINE is set", "extra trackers"):
        assert part in text
    assert str(Path.home()) not in text.replace("/root", "") or str(Path.home()) == "/"
    assert socket.gethostname() not in text
    monkeypatch.setattr(doctor, "unmet_requirements", lambda: (("peft>=99 (0.1 is installed)",), {}))
    shown = cli("doctor", "--json", code=1)
    assert json.loads(shown.out)["problems"] == ["peft>=99 (0.1 is installed) is not met"]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "hub.example"])
def test_a_hub_that_does_not_answer_is_no_crash(monkeypatch, endpoint):
    """Behind a firewall the doctor is needed most."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    said = doctor.diagnose(hub_seconds=0.5).hub
    assert "cannot be reached" in said or "which is no address" in said
