"""Doors at the user's files; each was found open once."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from deploy_folders import TEXTS
from experiments import snapshot
from kdlora.deploy import export
from kdlora.deploy.export import check_target
from kdlora.deploy.folder import EXPORT_RECORD, read_model_folder
from kdlora.deploy.stream import predict_file
from kdlora.distil.resume import CheckpointFolder
from kdlora.errors import ArtifactError, ConfigError
from kdlora.experiment.run import run_experiment
from kdlora.report.page import Page, write_page
from kdlora.system import ownership
from kdlora.system.ownership import MANIFEST, remove
from kdlora.system.storage import atomic_folder, claim_folder, hold_lock

SOURCE = Path(__file__).parents[2] / "src" / "kdlora"


@pytest.fixture
def rows(tmp_path) -> Path:
    """Ten texts to label."""
    path = tmp_path / "rows.txt"
    path.write_text("\n".join(TEXTS[:10]) + "\n")
    return path


def test_one_place_removes_and_nothing_else_does():
    """A removal somewhere else does not ask whose it is."""
    removals = re.compile(r"rmtree|\.unlink\(|\.rmdir\(|os\.remove|removedirs|os\.unlink")
    found = {
        file.relative_to(SOURCE).as_posix()
        for file in SOURCE.rglob("*.py")
        if removals.search(file.read_text(encoding="utf-8"))
    }
    assert found == {"system/ownership.py"}


@pytest.mark.parametrize("what", ["folder", "link", "file"])
def test_predict_keeps_a_folder_that_is_not_its_own(classifier, rows, tmp_path, what):
    """A folder of the user's with the name of the parts was emptied, at exit 0; a link took them to another folder."""
    theirs = tmp_path / "theirs" if what == "link" else tmp_path / "answers.csv.partial"
    if what == "file":
        theirs.write_text("years of work")
    else:
        theirs.mkdir()
        (theirs / "thesis.tex").write_text("years of work")
    if what == "link":
        (tmp_path / "answers.csv.partial").symlink_to(theirs)
    before = snapshot(tmp_path)
    for resume in (True, False):
        with pytest.raises(ArtifactError, match=r"answers\.csv\.partial.* was not made by kdlora"):
            predict_file(classifier, rows, tmp_path / "answers.csv", resume=resume)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("what", ["file", "link"])
def test_what_is_put_between_the_parts_stays(classifier, rows, tmp_path, monkeypatch, what):
    """The folder of an interrupted prediction is seen by people, who may put their notes there."""
    folder = tmp_path / "answers.csv.partial"

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kdlora.deploy.stream._Form.join", cut)
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
    monkeypatch.setenv("HOME", str(tmp_path))
    looks = [] if verb == "search" else [(".", "--dry-run")]
    for out in ((".",), ("~",), *looks):
        assert expected in cli(verb, name, "--out", *out, code=2).err
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


@pytest.mark.parametrize("name", ["tracking/tensorboard", "tracking/mlflow.db", "runs/a/tracking/wandb", "tracking"])
def test_trackers_write_into_their_own_folder(tmp_path, name):
    """Folders of trackers have links, so any was let pass: MLflow's tables went into the user's own database."""
    inside = tmp_path / "out" / "tracking" / "wandb"
    claim_folder(tmp_path / "out", "experiment")
    if name != "tracking":
        (inside / "run-1" / "logs").mkdir(parents=True)
        (inside / "latest-run").symlink_to("run-1")
        (inside / "run-1" / "logs" / "debug-core.log").symlink_to(tmp_path / "W&B's own log, in the user's cache")
        claim_folder(tmp_path / "out", "experiment")
    link = tmp_path / "out" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "home")
    with pytest.raises(ArtifactError, match=f"{name} is a link"):
        claim_folder(tmp_path / "out", "experiment")


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


@pytest.mark.parametrize("name", ["thesis.tex", "model.safetensors", "README.md", "LICENSE"])
def test_an_export_keeps_what_was_put_beside_it(classifier, tmp_path, name):
    """A second export replaced the folder with all that lay in it, the model's own weights and card among it."""
    target = tmp_path / "onnx"
    target.mkdir()
    (target / EXPORT_RECORD).write_text("{}")
    folder = read_model_folder(classifier)
    assert check_target(target, folder) == target
    (target / name).write_text("years of work")
    with pytest.raises(ArtifactError, match=f"{re.escape(name)} is no file of an export, and would be lost"):
        check_target(target, folder)
    (tmp_path / "current").symlink_to(target)  # which was refused when all stages had been made
    with pytest.raises(ArtifactError, match="current is a link"):
        check_target(tmp_path / "current", folder)


def test_an_export_keeps_what_was_put_there_while_it_was_made(classifier, tmp_path, monkeypatch):
    (target := tmp_path / "onnx").mkdir()
    (target / EXPORT_RECORD).write_text("{}")
    make = export._make_files

    def make_and_wait(*arguments):
        (target / "LICENSE").write_text("years of work")
        return make(*arguments)

    monkeypatch.setattr(export, "_make_files", make_and_wait)
    with pytest.raises(ArtifactError, match="LICENSE is no file of an export, and would be lost"):
        export.export_onnx(classifier, target, formats=["onnx"])
    assert (target / "LICENSE").exists()


@pytest.mark.parametrize("name", ["best.safetensors", "step-000000003", "step-by-step"])
def test_checkpoints_go_and_other_files_stay(tmp_path, name):
    """Whatever began with `step-` was taken for an old checkpoint, and removed."""
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
    page = Page("Scores", "comparison", "It is good.", ())
    for _ in range(2):  # its own it does replace
        write_page(page, tmp_path / "report.md", tmp_path / "report.html")
    (tmp_path / "report.md").write_text("# My own report, on kdlora")
    before = snapshot(tmp_path)
    with pytest.raises(ArtifactError, match=r"report\.md was not written by kdlora and stays"):
        write_page(page, tmp_path / "report.md", tmp_path / "report.html")
    assert snapshot(tmp_path) == before


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Whoever may write to the folder had a file of ours emptied and overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("process of my work")  # begins as a lock of ours does
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.lock"), hold_lock(tmp_path / ".lock", "runs it"):
        pass
    assert victim.read_text() == "process of my work"


@pytest.mark.parametrize("verb", ["label", "ask"])
def test_a_lock_of_somebody_else_stays(cli, workshop, tmp_path, verb):
    """A `.lock` of the user's was overwritten, at times before its folder was refused."""
    theirs = tmp_path / "project"
    theirs.mkdir()
    (theirs / ".lock").write_text("packages = 12")
    if verb == "label":
        arguments = [workshop.student, workshop.train, "--to", theirs, "--label-name", "no", "--label-name", "yes"]
    else:
        arguments = [workshop.train, "--to", theirs, "--model", "m", "--base-url", "http://127.0.0.1:9/v1"]
    assert ".lock was not made by kdlora" in cli(verb, *arguments, code=2).err
    (theirs / "notes.txt").write_text("mine")
    assert "is not empty" in cli(verb, *arguments, code=2).err
    kept = {entry.name: entry.read_text() for entry in theirs.iterdir()}
    assert kept == {".lock": "packages = 12", "notes.txt": "mine"}


@pytest.mark.parametrize(
    ("kind", "inside"), [("experiment", "runs/mine/runs/fft-seed0"), ("suite", "runs/s/runs/a/b/runs/fft-seed0")]
)
def test_a_project_with_experiments_below_runs_is_none_itself(tmp_path, kind, inside):
    """`--out .` took the whole project over: the config beside `runs/` was rewritten, and its report replaced."""
    (tmp_path / ("config.yaml" if kind == "experiment" else "suite.yaml")).write_text("# mine\n")
    (tmp_path / inside).mkdir(parents=True)
    (tmp_path / inside / "run.json").write_text('{"schema_version": 1, "arm": "fft", "seed": 0}')
    assert not ownership._is_of_an_earlier_version(tmp_path, kind)
