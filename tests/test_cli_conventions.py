"""What people and programs expect of every verb: help with an example, JSON, completion, no colours, no bars."""

import json
import os
import re
import subprocess
import sys

import pytest
import typer

from kdlora.cli import app

pytest_plugins = ["experiment_fixtures"]

COMMANDS = typer.main.get_command(app).commands
VERBS = sorted(COMMANDS)


def shell(*arguments, **environment):
    """Call the command line in a process of its own, without a terminal."""
    command = [sys.executable, "-m", "kdlora", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120", **environment}
    )


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
        ("kdlora run --family rob", {"roberta"}),
        ("kdlora run --set student.train.learn", {"student.train.learning_rate="}),
        ("kdlora export x --format onnx-", {"onnx-int8"}),
    ],
)
def test_the_shell_completes_verbs_names_and_keys(words, wanted):
    """Completion that fails does so without a word: the shell offers files instead."""
    number = str(len(words.split()) - 1)
    done = shell(_KDLORA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=number)
    assert wanted <= set(done.stdout.split()), done.stderr


def test_errors_go_to_standard_error_without_colour(tmp_path):
    """An error on standard output ends up in the file that the user redirected to."""
    done = shell("validate", str(tmp_path / "absent.yaml"), NO_COLOR="1", FORCE_COLOR="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("kdlora: config file")
    usage = shell("validate")
    assert (usage.returncode, usage.stdout) == (2, "")
    assert usage.stderr.startswith("kdlora: Missing argument")


def test_the_version_is_told_and_a_missing_verb_shows_the_help():
    """The first thing that a bug report is asked for; and an error without a word."""
    assert re.fullmatch(r"kdlora \d+\.\d+\.\d+\S*\n", shell("--version").stdout)
    alone = shell()
    assert alone.returncode == 2
    assert "Usage: kdlora" in alone.stdout + alone.stderr
    assert "kdlora: \n" not in alone.stderr


def test_options_that_are_missing_are_named_as_options():
    """Config keys in the message, for somebody who has never seen a config file."""
    done = shell("run", "--family", "bert")
    assert done.returncode == 2
    assert "--train FILE" in done.stderr
    assert "kdlora run --help" in done.stderr


def test_no_colour_where_it_is_not_wanted():
    """Escape codes in a log, or for a reader who switched them off."""
    assert "\x1b[" in shell("tasks", FORCE_COLOR="1").stdout
    for arguments in (["tasks"], ["--help"]):
        assert "\x1b[3" not in shell(*arguments, FORCE_COLOR="1", NO_COLOR="1").stdout
