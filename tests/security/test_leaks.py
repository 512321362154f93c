"""Doors at our processes, and what leaves the machine or reaches a terminal; each was found open once."""

import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from graphs import run_python

from experiments import edit_json
from fabricate import make_record
from kdlora.cli.app import print_table
from kdlora.configfile import save_config
from kdlora.data.load import load_splits
from kdlora.deploy.folder import without_places
from kdlora.deploy.hub import _contents, plan_push
from kdlora.deploy.stream import predict_file
from kdlora.errors import ArtifactError, ConfigError, KdLoraError, ModelError, ToStderr, harmless
from kdlora.evidence.records import ExperimentLayout, write_results
from kdlora.experiment import team
from kdlora.experiment.engines import connect
from kdlora.experiment.jobs import Job, carry_out
from kdlora.experiment.recording import look_at
from kdlora.experiment.scoring import evaluate_experiment
from kdlora.experiment.team import Team, _meet
from kdlora.foreign import read_json
from kdlora.system.environment import git_state
from kdlora.system.launch import Launch
from kdlora.system.storage import write_json_atomic


def test_a_module_in_the_current_folder_is_not_run(tmp_path):
    """A data folder with a `json.py` had it imported by the server of the children."""
    (tmp_path / "json.py").write_text("import pathlib; pathlib.Path('owned').touch(); raise SystemExit(3)")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text("from kdlora.system.children import run_in_child\nimport os\nprint(run_in_child(os.getpid))")
    done = run_python(script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "owned").exists()


def test_libraries_tell_their_makers_nothing(tmp_path):
    """ONNX Runtime queued each model, its speed and the path of Python for a host of Microsoft's, MLflow each run."""
    pytest.importorskip("mlflow.telemetry")
    switches = ("CI", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST", "ORT_DISABLE_TELEMETRY", "MLFLOW_DISABLE_TELEMETRY")
    plain = {name: value for name, value in os.environ.items() if name not in switches}
    homes = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(tmp_path))
    code = "import kdlora, onnxruntime, mlflow; print(mlflow.telemetry.get_telemetry_client())"
    done = subprocess.run([sys.executable, "-c", code], env=plain | homes, capture_output=True, text=True, check=True)
    assert done.stdout == "None\n"
    assert not [found for name in ("Microsoft", "mlflow") for found in tmp_path.rglob(name)]


# What runs beside us.


def _git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
@pytest.mark.parametrize("changed", [False, True])
def test_a_repositorys_own_programs_do_not_run(tmp_path, changed):
    """A data set that came with its `.git` ran its monitor, filters and hooks when a run was recorded."""
    mark = tmp_path / "owned"
    tree = tmp_path / "data"
    tree.mkdir()
    _git(tree, "init")
    (tree / "rows.csv").write_text("text\n")
    (tree / ".gitattributes").write_text("*.csv filter=evil diff=evil\n")
    _git(tree, "add", ".")
    _git(tree, "commit", "-m", "first")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\ntouch {mark}\ncat\n")
    program.chmod(0o755)
    keys = ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "diff.evil.textconv", "core.sshCommand")
    for key in keys:
        _git(tree, "config", key, str(program))
    hooks = tree / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    for name in ("post-index-change", "fsmonitor-watchman", "pre-commit"):
        (hooks / name).symlink_to(program)
    (tree / "rows.csv").write_text("texts\n" if changed else "text\n")
    os.utime(tree / "rows.csv", (1, 1))  # so that git has to look at what is in it
    state = git_state(tree)
    assert not mark.exists()
    assert state["dirty"] == ("yes" if changed else "no")
    subprocess.run(["git", "status"], cwd=tree, capture_output=True, check=False)
    assert mark.exists(), "the trap works"


def test_a_folders_config_does_not_say_what_is_trusted(workshop, classifier, tmp_path):
    """`kdlora evaluate` on an experiment from somebody else ran the code that its config trusted."""
    teacher, layout = tmp_path / "teacher", ExperimentLayout(tmp_path / "out")
    shutil.copytree(classifier, teacher)
    classes = {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}
    edit_json(teacher / "config.json", model_type="evil", auto_map=classes)
    (teacher / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'owned')!r}).touch()")
    layout.root.mkdir()
    section = {"fine_tuned": str(teacher), "model": None, "trust_remote_code": True}
    layout.config.write_text(save_config(workshop.config({"teacher": section})))
    write_results(layout.results, [make_record()])
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na film,positive\nanother,negative\n")
    with pytest.raises(KdLoraError, match="needs Python code of its own"):
        evaluate_experiment(layout.root, str(rows))
    assert not (tmp_path / "owned").exists()
    with pytest.raises(Exception, match=r".*"):
        evaluate_experiment(layout.root, str(rows), trust_remote_code=True)
    assert (tmp_path / "owned").exists(), "the trap works"


# What leaves the machine.


@pytest.fixture
def finished(tmp_path, classifier):
    """An experiment's folder with much that nobody means to publish."""
    layout = ExperimentLayout(tmp_path / "home of jane" / "runs" / "secret-client")
    shutil.copytree(classifier, layout.student)
    labels = {"0": "/tmp/x", "1": "/b/c", "2": "c"}
    place = {"_name_or_path": f"{tmp_path}/models/bert"}
    edit_json(layout.student / "config.json", **place, text_config=place, id2label=labels)
    (layout.student / "README.md").write_text(f"made in {layout.root}\n")
    for name in ("customers.csv", "optimizer.pt", "training_args.bin", "run.log", "notes.json", "model.safetensors~"):
        (layout.student / name).write_text("private")
    for name in ("vocab.txt", "LICENSE"):
        (layout.student / name).unlink(missing_ok=True)
        (layout.student / name).symlink_to("customers.csv")
    layout.onnx.mkdir()
    for name in ("kdlora_export.json", "model.onnx", "debug.txt"):
        (layout.onnx / name).write_text("{}")
    write_json_atomic(layout.onnx / "config.json", without_places(read_json(layout.student / "config.json")))
    layout.config.write_text("{}")
    text = f"<p>{layout.root}/runs, /home/jane/data.csv:3, '/tmp/a/b.csv', https://example.org/a/b, /b/c, 1/2</p>"
    layout.report_md.write_text(text)
    layout.report_html.write_text(text)
    return layout


def test_a_push_sends_what_a_model_consists_of(finished, cli):
    """Whatever lay in the folder went along: customers.csv, optimizer.pt, and the file that a link names."""
    parcel = plan_push(finished.root, "someone/student", report=True)
    onnx = {"onnx/kdlora_export.json", "onnx/model.onnx", "onnx/config.json"}
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert set(parcel.sizes) == model | onnx | {"report.md", "report.html"}
    assert {"customers.csv", "optimizer.pt", "vocab.txt", "LICENSE", "onnx/debug.txt"} < set(parcel.stays)
    shown = cli("push", finished.root, "someone/student", "--dry-run")
    assert "model.safetensors" in shown.err
    assert "not sent: LICENSE, customers.csv" in shown.err
    assert "report.html" not in shown.err
    assert json.loads(cli("push", finished.root, "someone/student", "--dry-run", "--json").out)["sizes"]
    real = cli("push", finished.root, "someone/student", code=2)  # the tests have no network
    assert real.err.index("model.safetensors") < real.err.index("HF_HUB_OFFLINE is set"), "named before it is sent"
    elsewhere = finished.onnx.rename(finished.root.parent / "another client's")
    finished.onnx.symlink_to(elsewhere)
    with pytest.raises(ArtifactError, match="is a link, and what it leads to may be another model"):
        plan_push(finished.root, "someone/student")
    (finished.student / "NOTICE").symlink_to(finished.root.parent / "id_rsa")
    finished.onnx.unlink()
    with pytest.raises(ModelError, match="NOTICE is a link out of its folder"):
        plan_push(finished.root, "someone/student")


def test_paths_of_this_machine_are_not_published(finished, tmp_path):
    """A report named the user, the client and the folders of whoever pushed it."""
    contents = _contents(finished, True, "someone/student")
    expected = "<p>runs, data.csv:3, 'b.csv', https://example.org/a/b, /b/c, 1/2</p>"
    assert contents["report.md"] == contents["report.html"] == expected.encode()
    for one in (contents["config.json"], contents["onnx/config.json"].read_bytes()):
        settings = json.loads(one)
        assert settings["_name_or_path"] == settings["text_config"]["_name_or_path"] == "bert"
        assert settings["id2label"]["0"] == "/tmp/x", "a label is no path"
    sent = b"".join(one if isinstance(one, bytes) else one.read_bytes() for one in contents.values())
    assert str(tmp_path).encode() not in sent
    edit_json(layout_config := finished.onnx / "config.json", tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(ArtifactError, match="names a path of this machine; export the student again"):
        plan_push(finished.root, "someone/student")  # its record has the hash of the file as it is
    layout_config.unlink()

    # A model without its weights on the Hub helps nobody, and what a link names may be anything.
    (finished.student / "model.safetensors").rename(finished.student / "elsewhere")
    (finished.student / "model.safetensors").symlink_to("elsewhere")
    with pytest.raises(ModelError, match="are links, which are not sent"):
        plan_push(finished.root, "someone/student")


# What a terminal and a log show.

URLS = [
    "postgresql://jane:{}@db.example.org/study",
    "mysql://jane:with/slash@{}@db/study",
    "s3://{}@bucket/suite",
    "https://store.example.org/a?X-Amz-Signature={}&x=1",
    "sftp://host/a;password={}",
    "postgresql://db/study?user=jane&password={}",
]


@pytest.mark.parametrize("url", URLS)
def test_passwords_of_addresses_are_not_shown(url):
    """A message that quotes an address is copied into a bug report, password and all."""
    secret = "hunter2hunter2"
    url = url.format(secret)
    for text in (str(ArtifactError(f"{url} is locked")), str(ConfigError(f"--out '{url}'")), harmless(url)):
        assert secret not in text
        assert "***" in text
    record = logging.LogRecord("a", logging.WARNING, "", 0, "cannot reach %s", (url,), None)
    assert secret not in ToStderr().format(record)
    for plain in ("ray://head:10001 is gone", "USER/REPO@main", "a@b.org", "https://x.org/a?b=c", "12:30 @ home"):
        assert harmless(plain) == plain


def test_a_record_keeps_no_password_of_a_trackers_address(workshop, tmp_path):
    """What MLflow says of a server that does not answer has its address, which went on into report and tables."""
    config, layout = workshop.config(), ExperimentLayout(tmp_path)
    facts = look_at(load_splits(config.task, config.data), config.data)

    def fail(*_, **__):
        raise RuntimeError("API request to https://jane:hunter2hunter2@h/api failed")

    record = carry_out(Job("train", "one", config, layout, "student-lora", 0, facts, ships=True), in_child=fail).record
    assert record.error == "RuntimeError: API request to https://***@h/api failed"
    assert "hunter2" not in layout.run("student-lora", 0).record.read_text(encoding="utf-8")


def test_names_from_data_do_not_steer_the_terminal(cli, workshop, tmp_path):
    """A column's name could set the window's title, hide an error, or paint a line that kdlora never wrote."""
    evil = "te\x1b]0;owned\x07xt\x1b[2K\x9b1A\u202e"
    rows = tmp_path / "rows.csv"
    rows.write_text(f"{evil},label\na,b\n", encoding="utf-8")
    models = ("--teacher", workshop.teacher, "--student", workshop.student)
    shown = cli(
        "run", "--train", rows, "--validation", rows, "--text", "text", *models, "--out", tmp_path / "out", code=2
    )
    assert "\\x1b" in shown.err
    assert not set(shown.err) & set("\x1b\x07\x9b\u202e")


def test_names_from_data_are_no_markup(capfd):
    """A label in brackets vanished from every table, and `[/b]` ended the command after all its work."""
    print_table(("label",), [("[urgent] complaint",), ("a[/b] :smile:",)], title="[what]")
    shown = capfd.readouterr().out
    assert all(text in shown for text in ("[what]", "[urgent] complaint", "a[/b] :smile:"))


def test_answers_do_not_steer_the_terminal(classifier, tmp_path, capfd):
    """Ids of rows come from strangers, and JSON leaves some control characters as they are."""
    rows = tmp_path / "rows.jsonl"
    ident = "a\x1b]0;owned\x07\x9b2K\u202eb é"
    rows.write_text(json.dumps({"id": ident, "text": "a film"}) + "\n")
    predict_file(classifier, rows)
    shown = capfd.readouterr().out
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert json.loads(shown)["id"] == ident, "to a program it is the same"


# Several processes, and clusters.


class Store(dict):
    """Holds what processes tell each other."""

    def check(self, keys):
        return all(key in self for key in keys)

    get, set = dict.__getitem__, dict.__setitem__


@pytest.mark.parametrize("change", ["config", "root", "stage"])
def test_a_process_carries_out_only_what_it_was_started_with(workshop, tmp_path, monkeypatch, change):
    """Whoever reaches the store of torchrun could set a config, with code that a model brings, for another to run."""
    config, layout, store = workshop.config(), ExperimentLayout(tmp_path / "out"), Store()
    said = {"stage": "train_run", "details": [], "config": config.model_dump(mode="json"), "root": str(layout.root)}
    if change == "config":
        said["config"]["teacher"]["trust_remote_code"] = True
    else:
        said[change] = {"root": "/etc", "stage": "os.system"}[change]
    store |= {"stage-1": json.dumps(said), "end": json.dumps({"kind": "done"})}
    team = Team(Launch(rank=1, count=2), store)
    monkeypatch.setattr(Team, "_take_part", lambda *_: pytest.fail("it was carried out"))
    team.follow(config, layout)
    assert "another config or folder" in json.loads(store["outcome-1-1"])["text"]


def test_the_store_of_one_machine_listens_to_that_machine(monkeypatch):
    """PyTorch opens it on every interface, and asks nobody who they are."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    store = _meet(Launch(rank=0, count=2, port=port))
    store.set("a", "b")
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass  # another address of this machine stands for those that others reach

    # Where the launcher has one, which listens everywhere, kdlora opens no second.
    asked = {}
    monkeypatch.setattr(team.socket, "create_server", lambda *_: pytest.fail("a door was opened"))
    monkeypatch.setattr(team, "TCPStore", lambda *_, **options: asked.update(options) or store)
    _meet(Launch(rank=0, count=2, hosted=True))
    assert (asked["is_master"], asked["master_listen_fd"]) == (False, None)


def test_a_ray_cluster_has_no_dashboard_and_is_nobody_elses(monkeypatch, tmp_path):
    """A dashboard runs code for whoever reaches its port; Ray joins the cluster that a shared folder's file names."""
    ray = pytest.importorskip("ray")
    asked = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect("ray")
    assert asked["include_dashboard"] is False
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("it was joined"))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379")
    os.chown(tmp_path / "ray" / "ray_current_cluster", 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(
        os, "getuid", lambda: 12345
    )
    with pytest.raises(ConfigError, match="belongs to another user"):
        connect("ray")
