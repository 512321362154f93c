"""Doors at the user's files, our processes, and what leaves the machine; each was found open once."""

import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from deploy_folders import TEXTS, build_classifier
from experiments import snapshot
from kdlora.deploy.hub import plan_push
from kdlora.deploy.stream import predict_file
from kdlora.distil.resume import CheckpointFolder
from kdlora.errors import ArtifactError, ConfigError, HarmlessFormatter, ModelError, harmless
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.engines import connect
from kdlora.experiment.run import run_experiment
from kdlora.experiment.team import Team
from kdlora.system import ownership
from kdlora.system.children import _make_scratch
from kdlora.system.environment import git_state
from kdlora.system.ownership import MANIFEST, claim_folder, owned_name, remove
from kdlora.system.storage import atomic_folder, hold_lock
from kdlora.terminal import SafeConsole

SOURCE = Path(__file__).parents[2] / "src" / "kdlora"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Path:
    """A whole model folder; read only."""
    return build_classifier("bert", tmp_path_factory.mktemp("classifier") / "model")


@pytest.fixture
def rows(tmp_path) -> Path:
    """Ten texts to label."""
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(TEXTS[:10]) + "\n")
    return path


# What is the user's stays.


def test_one_place_removes_and_nothing_else_does():
    """A removal somewhere else does not ask whose it is."""
    removals = re.compile(r"rmtree|\.unlink\(|\.rmdir\(|os\.remove|removedirs|os\.unlink")
    found = {
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        if removals.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"system/ownership.py"}


@pytest.mark.parametrize("what", ["folder", "link"])
def test_predict_keeps_a_folder_that_is_not_its_own(classifier, rows, tmp_path, what):
    """A folder of the user's with the name of the parts was emptied, at exit 0; a link took them to another folder."""
    theirs = tmp_path / "theirs" if what == "link" else tmp_path / "answers.csv.partial"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    if what == "link":
        (tmp_path / "answers.csv.partial").symlink_to(theirs)
    before = snapshot(tmp_path)
    for resume in (True, False):
        with pytest.raises(ArtifactError, match=r"answers\.csv\.partial stands where"):
            predict_file(classifier, rows, tmp_path / "answers.csv", resume=resume)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_is_put_between_the_parts_stays(classifier, rows, tmp_path, monkeypatch, what):
    """The folder of an interrupted prediction is seen by people, who may put their notes there."""
    folder = tmp_path / "answers.csv.partial"

    def cut(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdlora.deploy.stream.PartialResult.finish", cut)
        with pytest.raises(KeyboardInterrupt):
            predict_file(classifier, rows, tmp_path / "answers.csv")
    if what == "file":
        (folder / "notes.txt").write_text("mine")
    else:
        (folder / "part-00000009-1-0").symlink_to(rows)
    with pytest.raises(ArtifactError, match="was not made by kdlora and would be lost"):
        predict_file(classifier, rows, tmp_path / "answers.csv")
    (name,) = {"notes.txt", "part-00000009-1-0"} & {entry.name for entry in folder.iterdir()}
    (folder / name).unlink()
    assert predict_file(classifier, rows, tmp_path / "answers.csv").resumed == 10
    assert not folder.exists()


def test_predict_does_not_replace_its_own_input(classifier, tmp_path):
    """The labelled file would stand where the only copy of the rows was."""
    source = tmp_path / "rows.csv"
    source.write_text("text\na film\n")
    (tmp_path / "link.csv").symlink_to(source)
    for to in (source, tmp_path / "link.csv"):
        with pytest.raises(ConfigError, match="would replace the rows"):
            predict_file(classifier, source, to)
    assert source.read_text() == "text\na film\n"


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        ("run", "is not empty and holds no .kdlora.json"),
        ("suite", "is no suite's folder"),
        ("search", "is no search's folder"),
    ],
)
def test_a_config_beside_the_results_is_not_rewritten(cli, workshop, tmp_path, monkeypatch, verb, expected):
    """`--out .` beside one's own config replaced that file, comments and all, and took the folder for ours."""
    values = workshop.values()
    if verb == "suite":
        families = {"b": {side: {"model": values[side]["model"]} for side in ("teacher", "student")}}
        values = {"name": "mine", "tasks": {"a": {"task": {}, "data": values["data"]}}, "families": families}
        values["seeds"] = [0]
    elif verb == "search":
        values["search"] = {"space": {"student.train.learning_rate": [1e-3, 5e-3]}, "trials": 2}
    monkeypatch.chdir(tmp_path)
    name = "config.yaml" if verb == "run" else f"{verb}.yaml"
    Path(name).write_text("# my comments\n" + yaml.safe_dump(values))
    Path("student").mkdir()
    Path("student", "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    refused = cli(verb, name, "--out", ".", code=2)
    assert expected in refused.err
    assert snapshot(tmp_path) == before


def test_a_folder_with_links_is_not_worked_in(workshop, tmp_path):
    """An experiment folder from somebody else may hold a link where we write or remove."""
    victim = tmp_path / "home"
    (victim / "checkpoints").mkdir(parents=True)
    (victim / "checkpoints" / "thesis.tex").write_text("years of work")
    out = tmp_path / "out"
    claim_folder(out, "experiment")
    (out / "runs").mkdir()
    (out / "runs" / "student-lora-seed0").symlink_to(victim)
    with pytest.raises(ArtifactError, match="student-lora-seed0 is a link"):
        run_experiment(workshop.config(), out)
    assert list(snapshot(victim)) == ["checkpoints/thesis.tex"]
    with pytest.raises(ArtifactError, match="stays"):
        remove(out / "runs" / "student-lora-seed0" / "checkpoints")
    remove(out / "runs" / "student-lora-seed0")  # the link goes, and not what it names
    assert list(snapshot(victim)) == ["checkpoints/thesis.tex"]


def test_a_folder_is_replaced_and_worked_in_only_where_it_is_ours(tmp_path):
    """What puts a folder in the place of another asks whose that is; a suite would remove the runs of a search."""
    theirs = tmp_path / "student"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="stays"), atomic_folder(theirs) as temporary:
        (temporary / "weights").write_text("new")
    assert list(snapshot(tmp_path)) == ["student/thesis.tex"]
    claim_folder(tmp_path / "out", "search")
    with pytest.raises(ArtifactError, match="is the folder of a search, not of a suite"):
        claim_folder(tmp_path / "out", "suite")


def test_an_export_keeps_what_was_put_beside_it(classifier, tmp_path):
    """A second export replaced the folder with all that lay in it."""
    from kdlora.deploy.export import check_target
    from kdlora.deploy.folder import EXPORT_RECORD, read_model_folder

    target = tmp_path / "onnx"
    target.mkdir()
    (target / EXPORT_RECORD).write_text("{}")
    folder = read_model_folder(classifier)
    assert check_target(target, folder) == target
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"thesis\.tex is no file of an export, and would be lost"):
        check_target(target, folder)


@pytest.mark.parametrize("name", ["best.safetensors", "step-000000003", "step-by-step"])
def test_checkpoints_go_and_other_files_stay(tmp_path, name):
    """Whatever began with `step-` was taken for an old checkpoint, and removed."""
    import torch

    theirs = tmp_path / name
    if name.startswith("best"):
        theirs.write_text("mine")
    else:
        theirs.mkdir()
        (theirs / "thesis.tex").write_text("years of work")
    before = snapshot(tmp_path)
    checkpoints = CheckpointFolder(tmp_path, {"seed": 0})

    def write() -> None:
        for step in (1, 2):
            checkpoints.write(step, {"state": {}}, {"weights": {"a": torch.zeros(1)}})

    if name == "step-by-step":
        write()
        assert [path.name for path in sorted(tmp_path.glob("step-0*"))] == ["step-000000002"]
        (tmp_path / MANIFEST).unlink()  # a training of days must go on after an upgrade: 0.1 wrote none
        assert checkpoints.latest().state == {}
    else:
        for call in (checkpoints.latest, write):
            with pytest.raises(ArtifactError, match="has a name that checkpoints take"):
                call()
    assert snapshot(tmp_path).items() >= before.items()


def test_a_report_replaces_no_report_of_the_users(tmp_path):
    """`kdlora compare` writes into the current folder, where people keep a report.md of their own."""
    from kdlora.report.page import Page, write_page

    page = Page("Scores", "comparison", "It is good.", ())
    write_page(page, tmp_path / "report.md", tmp_path / "report.html")
    write_page(page, tmp_path / "report.md", tmp_path / "report.html")  # its own it does replace
    (tmp_path / "report.md").write_text("# My own report, on kdlora")
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"report\.md was not written by kdlora and stays"):
        write_page(page, tmp_path / "report.md", tmp_path / "report.html")
    assert snapshot(tmp_path) == before


# Locks and temporary folders that others can write to.


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Whoever may write to the folder had a file of ours emptied and overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("years of work")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises((OSError, ArtifactError)), hold_lock(tmp_path / ".lock", "runs it"):
        pass
    assert victim.read_text() == "years of work"


@pytest.fixture
def shared_temporary(tmp_path, monkeypatch):
    """A folder for temporary files that others use too."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_names_in_the_shared_folder_stop_no_server(shared_temporary):
    """Any local user could end every command by a folder's name."""
    place, host = owned_name().split("-")[0], socket.gethostname()
    names = [
        f"kdlora-scratch-{place}-²-0-0123abcd",
        f"kdlora-scratch-{place}-{'9' * 20}-0-0123abcd",
        f"kdlora-scratch-{host}-²-0-ab",
        f"kdlora-scratch-{host}-{'9' * 20}-0-ab",
        f"kdlora-scratch-{host}-1-{'9' * 5000}-ab",
    ]
    for name in names:
        if len(name) < 255:
            (shared_temporary / name).mkdir()
    assert Path(_make_scratch()).is_dir()


def test_scratch_of_another_namespace_or_user_stays(shared_temporary, monkeypatch):
    """In a container with the same host name, process ids mean other processes: a live one's files were removed."""
    with monkeypatch.context() as patch:
        readlink = Path.readlink
        patch.setattr(
            Path, "readlink", lambda self: Path("pid:[1]") if str(self) == "/proc/self/ns/pid" else readlink(self)
        )
        ownership._place.cache_clear()
        other = shared_temporary / f"kdlora-scratch-{owned_name()}"
    ownership._place.cache_clear()
    gone = other.with_name(re.sub(r"-\d+-\d+-", "-999999999-0-", other.name))
    gone.mkdir()
    place = owned_name().split("-")[0]
    assert not gone.name.startswith(f"kdlora-scratch-{place}")
    somebody = shared_temporary / f"kdlora-scratch-{place}-999999999-0-0123abcd"
    somebody.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: somebody.stat().st_uid + 1)
        _make_scratch()
    assert gone.is_dir()
    assert somebody.is_dir()
    _make_scratch()
    assert not somebody.exists()


def test_a_module_in_the_current_folder_is_not_run(tmp_path):
    """A data folder with a `json.py` had it imported by the server of the children."""
    (tmp_path / "json.py").write_text("import pathlib; pathlib.Path('owned').touch(); raise SystemExit(3)")
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text("from kdlora.system.children import run_in_child\nimport os\nprint(run_in_child(os.getpid))")
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "owned").exists()


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


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_state_of_a_linked_working_tree_is_read(tmp_path):
    """Objects and index of a linked working tree lie in two places; a wrong one makes every tree dirty, or none."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    _git(first, "init")
    (first / "a.txt").write_text("a")
    _git(first, "add", ".")
    _git(first, "commit", "-m", "first")
    _git(first, "worktree", "add", str(second), "-b", "other")
    (first / "a.txt").write_text("b")
    assert git_state(first)["dirty"] == "yes"
    (second / "deep").mkdir()
    assert git_state(second / "deep")["dirty"] == "no"


def test_a_folders_config_does_not_say_what_is_trusted(workshop, classifier, tmp_path):
    """`kdlora evaluate` on an experiment from somebody else ran the code that its config trusted."""
    from fabricate import make_record
    from kdlora.configfile import save_config
    from kdlora.errors import KdLoraError
    from kdlora.evidence.records import write_results
    from kdlora.experiment.scoring import evaluate_experiment

    teacher, layout = tmp_path / "teacher", ExperimentLayout(tmp_path / "out")
    shutil.copytree(classifier, teacher)
    settings = json.loads((teacher / "config.json").read_text())
    settings |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoTokenizer": "evil.Evil"}}
    (teacher / "config.json").write_text(json.dumps(settings))
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
    settings = json.loads((layout.student / "config.json").read_text())
    settings |= {"_name_or_path": f"{tmp_path}/models/bert", "id2label": {"0": "/tmp/x", "1": "/b/c", "2": "c"}}
    (layout.student / "config.json").write_text(json.dumps(settings))
    (layout.student / "README.md").write_text(f"made in {layout.root}\n")
    for name in ("customers.csv", "optimizer.pt", "training_args.bin", "run.log", "notes.json", "model.safetensors~"):
        (layout.student / name).write_text("private")
    (tmp_path / "id_rsa").write_text("private")
    for name in ("vocab.txt", "LICENSE"):
        (layout.student / name).unlink(missing_ok=True)
        (layout.student / name).symlink_to(tmp_path / "id_rsa")
    layout.onnx.mkdir()
    for name in ("kdlora_export.json", "model.onnx", "debug.txt"):
        (layout.onnx / name).write_text("{}")
    layout.config.write_text("{}")
    text = f"<p>{layout.root}/runs, /home/jane/data.csv:3, '/tmp/a/b.csv', https://example.org/a/b, /b/c, 1/2</p>"
    layout.report_md.write_text(text)
    layout.report_html.write_text(text)
    return layout


def test_a_push_sends_what_a_model_consists_of(finished, cli):
    """Whatever lay in the folder went along: customers.csv, optimizer.pt, and the file that a link names."""
    parcel = plan_push(finished.root, "someone/student", report=True)
    onnx = {"onnx/kdlora_export.json", "onnx/model.onnx"}
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


def test_paths_of_this_machine_are_not_published(finished, tmp_path):
    """A report named the user, the client and the folders of whoever pushed it."""
    from kdlora.deploy.hub import _contents

    contents = _contents(finished, True, "someone/student")
    expected = "<p>runs, data.csv:3, 'b.csv', https://example.org/a/b, /b/c, 1/2</p>"
    assert contents["report.md"] == contents["report.html"] == expected.encode()
    settings = json.loads(contents["config.json"])
    assert settings["_name_or_path"] == "bert"
    assert settings["id2label"]["0"] == "/tmp/x", "a label is no path"
    sent = b"".join(one if isinstance(one, bytes) else one.read_bytes() for one in contents.values())
    assert str(tmp_path).encode() not in sent

    # A model without its weights on the Hub helps nobody, and what a link names may be anything.
    (finished.student / "model.safetensors").rename(finished.root / "elsewhere")
    (finished.student / "model.safetensors").symlink_to(finished.root / "elsewhere")
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
    assert secret not in HarmlessFormatter().format(record)
    for plain in ("ray://head:10001 is gone", "USER/REPO@main", "a@b.org", "https://x.org/a?b=c", "12:30 @ home"):
        assert harmless(plain) == plain


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


def test_answers_do_not_steer_the_terminal(classifier, tmp_path, capfd):
    """Ids of rows come from strangers, and JSON leaves some control characters as they are."""
    rows = tmp_path / "rows.jsonl"
    ident = "a\x1b]0;owned\x07\x9b2K\u202eb é"
    rows.write_text(json.dumps({"id": ident, "text": "a film"}) + "\n")
    predict_file(classifier, rows)
    shown = capfd.readouterr().out
    assert not set(shown) & set("\x1b\x07\x9b\u202e")
    assert json.loads(shown)["id"] == ident, "to a program it is the same"


def test_the_console_prints_no_codes_but_its_own(capsys):
    """Notes, failures and tables quote names of columns and labels too."""
    from rich.table import Table

    console = SafeConsole(force_terminal=True, width=80)
    table = Table("a\x1b[31m")
    table.add_row("\x1b]0;owned\x07b")
    console.print(table)
    console.print("note \x1b[2K", style="red", markup=False)
    shown = capsys.readouterr().out
    assert "note" in shown
    assert "\x1b]0" not in shown
    assert "\x07" not in shown
    assert "\x1b[2K" not in shown
    assert "\x1b[31m" in shown, "its own colours stay"


# Several processes, and clusters.


class Store(dict):
    """Holds what processes tell each other."""

    def check(self, keys):
        return all(key in self for key in keys)

    get, set = dict.__getitem__, dict.__setitem__


@pytest.mark.parametrize("change", ["config", "root", "stage"])
def test_a_process_carries_out_only_what_it_was_started_with(workshop, tmp_path, monkeypatch, change):
    """Whoever reaches the store of torchrun could set a config, with code that a model brings, for another to run."""
    from kdlora.system.launch import Launch

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
    from kdlora.experiment.team import _meet
    from kdlora.system.launch import Launch

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    store = _meet(Launch(rank=0, count=2, port=port))
    store.set("a", "b")
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", port), timeout=5):
        pass  # another address of this machine stands for those that others reach


def test_a_ray_cluster_that_is_started_here_has_no_dashboard(monkeypatch, tmp_path):
    """It runs code for whoever reaches its port, and every user of the machine does."""
    ray = pytest.importorskip("ray")
    asked = {}
    monkeypatch.setattr(ray, "init", lambda **options: asked.update(options))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect("ray")
    assert asked["include_dashboard"] is False

    # Ray joins the cluster that a file in a shared folder names, whoever wrote it.
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("it was joined"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("192.0.2.1:6379")
    os.chown(tmp_path / "ray" / "ray_current_cluster", 12345, -1) if os.getuid() == 0 else monkeypatch.setattr(
        os, "getuid", lambda: 12345
    )
    with pytest.raises(ConfigError, match="belongs to another user"):
        connect("ray")
