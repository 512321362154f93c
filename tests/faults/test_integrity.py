"""Damage and exchange of what is reused, a disk that fills, a folder that goes: noticed; nothing is mixed or half."""

import contextlib
import random
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from kill_driver import differences

from experiments import edit_json, read_rows, snapshot
from fabricate import edit_record
from kdlora.config import Config
from kdlora.distil.resume import CheckpointFolder
from kdlora.errors import ArtifactError
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.experiment import deployment
from kdlora.experiment.jobs import refuse_another_teacher
from kdlora.experiment.plan import PlannedRun
from kdlora.experiment.run import run_experiment
from kdlora.experiment.settle import with_values
from tiny import train_tokenizer, write_csv


@dataclass(frozen=True)
class Made:
    """A finished experiment on files that tests may change, and put back."""

    config: Config
    layout: ExperimentLayout
    train: Path
    student: Path

    def with_run(self, **values) -> Config:
        return self.config.model_copy(update={"run": self.config.run.model_copy(update=values)})


@pytest.fixture(scope="module")
def made(workshop, tmp_path_factory) -> Made:
    root = tmp_path_factory.mktemp("integrity")
    train = write_csv(root / "train.csv", read_rows(workshop.train))
    student = Path(shutil.copytree(workshop.student, root / "student"))
    changes = {"data": {"train": str(train)}, "student": {"model": str(student)}}
    config = workshop.config(changes | {"run": {"arms": ["kd-lora"], "checkpoint_seconds": 0.05}})
    result = run_experiment(config, root / "out")
    assert not result.failed
    return Made(config, result.layout, train, student)


@pytest.fixture
def layout(made, tmp_path) -> ExperimentLayout:
    """A copy of the experiment's folder, free to be damaged."""
    return ExperimentLayout(Path(shutil.copytree(made.layout.root, tmp_path / "out")))


@contextlib.contextmanager
def put_back(path: Path) -> Iterator[None]:
    content = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(content)


def flip_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1 - random.Random(1).randrange(len(content) // 2)] ^= 1
    path.write_bytes(content)


RECOMPUTED = [
    ("runs/kd-lora-seed0/adapter/adapter_model.safetensors", flip_one_bit),
    ("shipped.json", lambda path: path.write_text(path.read_text()[:-7])),
    ("teacher/model.safetensors", flip_one_bit),
    ("student/model.safetensors", flip_one_bit),
    ("adapter/adapter_model.safetensors", Path.unlink),
]


@pytest.mark.parametrize(("name", "damage"), RECOMPUTED, ids=[name for name, _ in RECOMPUTED])
def test_a_damaged_artefact_is_made_again(made, layout, name, damage):
    """One flipped bit in a weight gives a model that loads, answers, and is another one than the report says."""
    before = snapshot(layout.root)
    damage(layout.root / name)
    result = run_experiment(made.config, layout.root)
    assert not result.failed
    after = snapshot(layout.root)
    assert after[name][1] == before[name][1]
    for kept in before:  # the same weights, tokenizers and configs everywhere
        if kept.endswith((".safetensors", "tokenizer.json", "config.json")):
            assert after[kept][1] == before[kept][1], kept
    one, two = (read_predictions(place.run("kd-lora", 0).predictions) for place in (made.layout, layout))
    np.testing.assert_array_equal(one.logits, two.logits)


def test_a_teacher_that_would_be_another_one_is_refused_before_it_is_trained(made, layout):
    """Hours of a teacher on a GPU ended in students that were refused; the report set old ones beside a new teacher."""
    record = layout.run("kd-lora", 0).record
    told = r"fft-seed0: .*its record or .*runs/fft-seed0\) are gone.* taught kd-lora-seed0\. Put them back, or delete"
    smaller = with_values(made.config, {"teacher.train.micro_batch_tokens": 64})
    with pytest.raises(ArtifactError, match=told):  # other sums, and so other last bits
        refuse_another_teacher(PlannedRun("fft", 0, smaller), layout.root)
    gone = layout.run("fft", 0).record.rename(layout.root / "gone.json")
    with pytest.raises(ArtifactError, match=rf"{told}.* micro_batch_tokens or .* is another, too"):
        refuse_another_teacher(PlannedRun("fft", 0, smaller), layout.root)
    gone.rename(layout.run("fft", 0).record)
    edit_record(record, machine=read_record(record).machine | {"cores": "64"})
    refuse_another_teacher(PlannedRun("fft", 0, made.config), layout.root)  # does not: cores decide no bits
    for name, damage, threads in (("teacher/model.safetensors", flip_one_bit, 2), ("teacher", shutil.rmtree, 1)):
        damage(layout.root / name)
        before = snapshot(layout.root)
        with pytest.raises(ArtifactError, match=told):
            run_experiment(made.with_run(arms=("kd-lora", "kd-fft"), threads=threads), layout.root)
        assert snapshot(layout.root) == before
        edit_record(record, versions={"torch": "1.0"})
    assert not run_experiment(made.config, layout.root).failed  # there is nobody left to teach


def change_one_label(path: Path) -> None:
    rows = read_rows(path)
    rows[3]["label"] = "negative" if rows[3]["label"] == "positive" else "positive"
    write_csv(path, rows)


def test_changed_training_rows_are_refused(made, layout):
    """Two data sets in one table compare nothing; row order alone changes the batches."""
    before = snapshot(layout.root)
    for change in (change_one_label, lambda path: write_csv(path, read_rows(path)[::-1])):
        with put_back(made.train):
            change(made.train)
            with pytest.raises(ArtifactError, match="the data changed since"):
                run_experiment(made.config, layout.root)
    assert snapshot(layout.root) == before


def test_an_exchanged_pretrained_model_is_refused_for_further_seeds(made, layout):
    """A model folder, or a branch on the Hub, that moved on between two seeds: their spread would be its change."""
    for name in ("tokenizer.json", "model.safetensors"):
        with put_back(made.student / name), put_back(made.student / "tokenizer_config.json"):
            if name == "tokenizer.json":
                train_tokenizer("roberta").save_pretrained(made.student)
            else:
                flip_one_bit(made.student / name)
            result = run_experiment(made.with_run(seeds=(0, 1)), layout.root)
        assert [(record.seed, record.arm) for record in result.failed] == [(1, "kd-lora")]
        assert "the pretrained model, its weights or its tokenizer, changed since kd-lora" in result.failed[0].error
    assert not run_experiment(made.with_run(seeds=(0, 1)), layout.root).failed


def test_a_student_of_other_steps_than_its_control_is_refused(made, layout):
    """Two processes give a step twice the rows: "distillation adds" would be what half of the steps cost."""
    record = layout.run("kd-lora", 0).record
    edit_record(record, fingerprints=read_record(record).fingerprints | {"processes": "2"})
    result = run_experiment(made.with_run(arms=("kd-lora", "student-lora")), layout.root)
    assert [one.arm for one in result.failed] == ["student-lora"]
    assert "the number of processes, and so the rows of a step, changed since kd-lora" in result.failed[0].error


def test_data_that_change_while_the_experiment_runs_are_noticed(made, tmp_path):
    """Each run reads the files anew: an edit in the night would train the later arms on other rows."""
    with put_back(made.train):
        changed = []

        def edit_once(stage, event):
            if not changed:
                changed.append(stage)
                change_one_label(made.train)

        config = made.with_run(arms=("student-lora", "student-fft"))
        result = run_experiment(config, tmp_path / "out", listen=edit_once)
    assert changed[0].arm == "student-lora"
    assert [record.arm for record in result.failed] == ["student-fft"]
    assert "the data changed since student-lora with seed 0 was trained" in result.failed[0].error


def test_a_training_that_cannot_go_on_stops_the_experiment(made, layout):
    """It was a failed run among others, that trained for hours, and were then told of no teacher where it was one."""
    place = layout.run("student-lora", 0)
    CheckpointFolder(place.checkpoints, {"device": "cuda"}).write(1, {"state": {}}, {})
    with pytest.raises(ArtifactError, match=f"is of another training: .*changed. Delete {place.checkpoints} to"):
        run_experiment(made.with_run(arms=("kd-lora", "student-lora", "student-fft")), layout.root)
    assert not place.record.exists()
    assert not layout.run("student-fft", 0).root.exists()


def test_an_edited_record_or_list_of_shards_is_refused(made, layout):
    """A score improved by hand would choose what is shipped; an edited list could call any teacher's logits fresh."""
    edit_json(layout.run("kd-lora", 0).record, score=99.0)
    with pytest.raises(ArtifactError, match="does not fit its checksum"):
        run_experiment(made.config, layout.root)
    layout.run("kd-lora", 0).record.unlink()
    edit_json(layout.teacher_logits / "manifest.json", rows_per_shard=3)
    result = run_experiment(made.config, layout.root)
    assert "does not fit its checksum" in result.failed[0].error
    assert "Delete the folder" in result.failed[0].error


def test_an_export_that_was_damaged_is_made_again(made, layout):
    """The int8 file is what is deployed; a student that stays whole does not vouch for it."""
    layout.onnx.mkdir()
    (layout.onnx / "model.onnx").write_bytes(b"weights")
    layout.deployed.write_text(deployment._mark(made.config, layout, layout.benchmark))
    assert deployment.is_deployed(made.config, layout)
    for path in (layout.onnx / "model.onnx", layout.student / "tokenizer.json"):
        with put_back(path):
            flip_one_bit(path)
            assert not deployment.is_deployed(made.config, layout)
    assert deployment.is_deployed(made.config, layout)


def test_the_record_lists_what_the_run_left(made):
    """An artefact without a checksum is one that nobody checks."""
    for arm, folders in (("fft", {"teacher"}), ("kd-lora", {"runs/kd-lora-seed0/adapter"})):
        record = read_record(made.layout.run(arm, 0).record)
        assert f"runs/{arm}-seed0/predictions.parquet" in record.files
        assert {str(Path(name).parent) for name in record.files} - {f"runs/{arm}-seed0"} == folders
        assert set(record.fingerprints) >= {"config", "data", "base"}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 8 MiB in memory; skips where it cannot be mounted, which root alone may do."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={8 * 2**20}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("mount") else None
    if done is None or done.returncode:
        pytest.skip(f"a small disk cannot be mounted: {done and done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_costs_what_was_not_written_and_no_more_and_a_read_only_one_is_named(cli, disk, made):
    """What was cut off by the end of the disk must not be taken for a model, and the remedy is to free some space.

    The sizes let it fill at the lock, in the teacher's training, and while models are kept. Root writes into every
    folder, so it takes a disk that is mounted read-only.
    """
    command = ("run", made.layout.config, "--out", disk / "out")
    ballast = disk / "ballast"
    for kilobytes in (0, 300, 700):
        ballast.write_bytes(b"x" * (shutil.disk_usage(disk).free - kilobytes * 1024))
        shown = cli(*command, code=1)
        assert "No space left on device" in shown.err
        assert shown.err.strip().splitlines()[-1].endswith("free some space and run the same command again")
        records = [read_record(place) for place in ExperimentLayout(disk / "out").runs.glob("*/run.json")]
        assert {record.status for record in records} <= {"finished"}
        ballast.unlink()
    cli(*command)
    assert differences(made.layout.root, disk / "out") == []
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    shown = cli("run", made.layout.config, "--out", disk / "another", code=1)
    assert "Read-only file system" in shown.err
    assert str(disk) in shown.err


def test_a_folder_that_vanishes(made, tmp_path):
    """A network disk that is gone leaves its empty mount point: results must not be scattered over two places."""
    out, gone = tmp_path / "out", []

    def take_away(stage, event):
        if not gone:
            gone.append(stage)
            out.rename(tmp_path / "away")

    with pytest.raises(FileNotFoundError, match="removed, moved or unmounted") as caught:
        run_experiment(made.config, out, listen=take_away)
    assert str(out) in str(caught.value)
    assert not list(out.rglob("run.json"))
