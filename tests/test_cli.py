"""The command line: verbs, exit codes, and what comes to light before torch is loaded."""

import errno
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from experiments import snapshot
from kdlora import terminal
from kdlora.configfile import load_config
from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment import run as experiment_run
from kdlora.report.wording import count

SHOW_MODULES = (
    "import atexit, sys; "
    "atexit.register(lambda: print('LOADED', sorted({'torch', 'transformers', 'datasets', 'peft', 'pandas', "
    "'kdlora.experiment.run', 'numpy'} & set(sys.modules)))); "
    "sys.argv[0] = 'kdlora'; from kdlora.cli import main; main()"
)


def lightly(*arguments, seconds):
    """Call the command line in a process of its own; it must take little time and load nothing heavy."""
    for _ in range(3):  # processor time, the best of three: other processes must not decide
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", SHOW_MODULES, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        assert "LOADED []" in done.stdout
        if took < seconds:
            return done
    raise AssertionError(f"{took:.1f} s")


def write_config(path, values):
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture
def small(workshop, tmp_path):
    """A config file of one run, without a teacher."""
    return write_config(tmp_path / "small.yaml", workshop.values())


@pytest.fixture
def asked(cli, monkeypatch):
    """`asked(...)` gives the config that `kdlora run ...` would carry out; None where it is refused before."""

    def ask(*arguments):
        seen = []

        def stop(config, out, *, listen, before):
            seen.append(config)
            raise ArtifactError("far enough")

        monkeypatch.setattr(experiment_run, "run_experiment", stop)
        shown = cli("run", *arguments, code=2)
        assert not seen or shown.err == "kdlora: far enough\n"
        return seen[0] if seen else None

    return ask


def test_help_and_validate_come_at_once(small):
    """Seven seconds for `--help` is how a tool feels broken, and a check that takes as long as a run is not made.

    The goals are 0.3 and 1 s, which `benchmarks/start_up.py` measures; a core that is shared takes twice as long.
    """
    done = lightly("--help", seconds=0.6)
    assert done.returncode == 0
    assert {"run", "validate", "evaluate", "predict", "report", "tasks"} <= set(done.stdout.split())
    done = lightly("validate", str(small), "--set", "lora.rank=4", seconds=1.0)
    assert done.returncode == 0
    printed = yaml.safe_load(done.stdout.split("LOADED")[0])
    assert printed["lora"]["rank"] == 4
    assert printed["distil"] == {"alpha": 0.5, "temperature": 2.0, "loss": "kl"}


def test_run_prints_table_and_places_and_repeats_nothing(cli, small, tmp_path):
    """The end of a run is where the user looks; a note on standard output, or NaN, breaks programs that read JSON."""
    out = tmp_path / "out"
    first = cli("run", small, "--out", out)
    row = next(line for line in first.out.splitlines() if "student-lora" in line)
    record = read_results(ExperimentLayout(out).results)[0]
    for part in (f"{record.score:.2f}", count(record.trainable_parameters)):
        assert part in row
    for place in ("student", "report.html"):
        assert str(out / place) in first.out
    before = snapshot(out / "runs")
    again = cli("run", small, "--out", out, "--json")
    printed = json.loads(again.out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert printed["folder"] == str(out)
    assert printed["runs"] == json.loads((out / "results.json").read_text())["runs"]
    assert snapshot(out / "runs") == before


def test_run_with_options_makes_a_config(asked, workshop, tmp_path, monkeypatch):
    """The command of the README: files and models by options, names resolved against the current folder."""
    monkeypatch.chdir(tmp_path)
    config = asked(
        *("--train", os.path.relpath(workshop.train), "--text", "text", "--label", "label"),
        *("--teacher", workshop.teacher, "--student", workshop.student, "--set", "run.seeds=[7]"),
    )
    assert config.data.train == str(workshop.train)
    assert (config.task.text, config.task.label) == (("text",), ("label",))
    assert (config.teacher.model, config.student.model) == (str(workshop.teacher), str(workshop.student))
    assert config.run.seeds == (7,)
    glue = ("--task", "mrpc", "--data", "nyu-mll/glue", "--family", "bert")
    assert asked(*glue, "--text", "a") is None, "mrpc has its own columns"
    assert asked(*glue).student.model == "distilbert-base-uncased"


def test_options_go_over_the_config_file(asked, small, tmp_path):
    """An option that the file silently overrides is worse than none; a name of any script must arrive."""
    arguments = (small, "--label", "a", "--label", "b 😀", "--student", "other/model", "--set", "lora.rank=2")
    config = asked(*arguments)
    assert config.task.label == ("a", "b 😀")
    assert config.student.model == "other/model"
    assert config.lora.rank == 2
    assert config.student.train == load_config(small).student.train
    hub = write_config(tmp_path / "hub.yaml", yaml.safe_load(small.read_text()) | {"data": {"path": "someone/data"}})
    assert load_config(hub, ["data.validation=validation_matched"]).data.validation == "validation_matched"
    assert load_config(hub, ["data.train=small.csv", "data.path=null"]).data.train.endswith("/small.csv")


def test_a_failed_run_exits_with_1_and_the_others_finish(cli, workshop, tmp_path):
    """A script that sees 0 goes on with half of an experiment."""
    values = workshop.values(
        {"run": {"arms": ["student-fft", "student-lora"]}, "student": {"full_learning_rate": 1e30}}
    )
    config = write_config(tmp_path / "c.yaml", values)
    shown = cli("run", config, "--out", tmp_path / "out", code=1)
    assert "failed: student-fft, seed 0" in shown.out
    status = {record.arm: record.status for record in read_results(tmp_path / "out" / "results.json")}
    assert status == {"student-fft": "failed", "student-lora": "finished"}
    cli("run", config, "--out", tmp_path / "fast", "--fail-fast", code=1)
    assert [record.arm for record in read_results(tmp_path / "fast" / "results.json")] == ["student-fft"]


def test_evaluate_and_report_on_a_finished_experiment(cli, experiment, workshop, tmp_path):
    """Other truncation or label order in `evaluate` would give other scores for the same model and rows."""
    before, shipped = snapshot(experiment.folder), (experiment.shipped.arm, experiment.shipped.seed)
    shown = cli("evaluate", experiment.folder, workshop.validation, "--json")
    rows = {row["model"]: row for row in json.loads(shown.out)}
    student = next(record for record in experiment.records if (record.arm, record.seed) == shipped)
    assert rows["teacher"]["score"] == pytest.approx(experiment.records[0].score)
    assert rows["student"]["score"] == pytest.approx(student.score)
    assert rows["student"]["metrics"] == pytest.approx(student.metrics)
    assert rows["student"]["examples"] == 40
    assert f"{student.score:.2f}" in cli("evaluate", experiment.folder, workshop.validation).out
    assert snapshot(experiment.folder) == before
    again = cli("report", experiment.folder, "--out", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").stat().st_size > 10_000
    assert str(tmp_path / "report" / "report.md") in again.out
    bare, begun = ExperimentLayout(tmp_path / "bare"), ExperimentLayout(tmp_path / "begun")
    for path in (bare.config, bare.results, begun.config):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((experiment.folder / path.name).read_bytes())
    for arguments, expected in (
        (("evaluate", tmp_path, workshop.validation), "kdlora run"),
        (("evaluate", experiment.folder, tmp_path / "none.csv"), "none.csv"),
        (("evaluate", bare.root, workshop.validation), "no model to evaluate"),
        (("export", begun.root, "--to", tmp_path / "x", "--data", workshop.validation), "Run the experiment first"),
        (("report", tmp_path), str(tmp_path)),
    ):
        shown = cli(*arguments, code=2)
        assert expected in shown.err


@pytest.mark.parametrize(
    ("fault", "code", "expected"),
    [
        (KeyboardInterrupt(), 130, "the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), 1, "/out"),
        (MemoryError(), 1, "micro_batch_tokens"),
        (ZeroDivisionError(), None, ""),  # a bug comes with its traceback, or nobody can report it
    ],
)
def test_faults_of_the_machine_have_their_own_exit_codes(cli, small, monkeypatch, fault, code, expected):
    """A scheduler decides by the exit code whether to try again."""

    def fail(*_, **__):
        raise fault

    monkeypatch.setattr(experiment_run, "run_experiment", fail)
    if code is None:
        with pytest.raises(type(fault)):
            cli("run", small)
        return
    assert expected in cli("run", small, code=code).err
    monkeypatch.setenv("KDLORA_LOG", "loud")  # input, too: a mistake, and no fault of the machine
    shown = cli("tasks", code=2)
    assert "KDLORA_LOG is 'LOUD'; expected DEBUG" in shown.err


def test_the_table_shows_failed_arms_and_the_test_split(experiment, capsys, monkeypatch):
    """A failed arm left out of the table looks as if it had never been asked for."""
    monkeypatch.setenv("COLUMNS", "160")
    records = [
        record.model_copy(
            update={"status": "failed", "error": "[red]gone[/red]", "score": None}
            if record.arm == "lora"
            else {"test_score": 12.0 + record.seed}
        )
        for record in experiment.records
    ]
    terminal.print_result(replace(experiment, records=records, notes=("a note with [brackets]",)))
    shown = capsys.readouterr().out
    assert "score on the test split" in shown
    assert "a note with [brackets]" in shown
    assert "failed: lora, seed 1: [red]gone[/red]" in shown
    rows = {line.split()[1]: line for line in shown.splitlines() if line.startswith("│")}
    assert "failed" in rows["lora"]
    assert "12.50" in rows["kd-lora"]
    assert "0.71" in rows["kd-lora"]  # sample standard deviation of 12 and 13
