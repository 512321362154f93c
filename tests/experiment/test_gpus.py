"""Runs of an experiment at the same time, each on a GPU of its own; here on two names that no card has."""

import time
from types import SimpleNamespace

import experiment_children
import numpy as np
import pytest
import torch

from kdlora.distil.precision import visible_gpus
from kdlora.evidence.predictions import read_predictions
from kdlora.experiment import engines, jobs
from kdlora.experiment.run import plan_experiment, run_experiment
from kdlora.system import children

GPUS = ["GPU-first", "GPU-second"]


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(engines, "visible_gpus", lambda: GPUS)


@pytest.mark.usefixtures("two_gpus")
def test_runs_go_on_at_the_same_time_and_come_out_the_same(workshop, experiment, tmp_path, monkeypatch):
    """Two runs on one card run out of its memory; a teacher that labels before its controls ended is not doubted.

    Each run waits for another one here, so a plan that is carried out one by one fails. One run is killed, as for
    want of memory, which must not cost its neighbour.
    """
    (seen := tmp_path / "seen").mkdir()
    monkeypatch.setenv("KDLORA_TEST_PLACE", str(seen))
    monkeypatch.setattr(jobs, "train_run", experiment_children.train_beside_another)
    monkeypatch.setattr(jobs, "label_training_rows", experiment_children.label_after_controls)
    config = workshop.config({"run": {"arms": ["kd-lora", "student-lora"], "seeds": [0, 1], "device": "auto"}})
    assert "2 GPUs" in dict(plan_experiment(config, tmp_path / "out").lines())["time"]
    result = run_experiment(config, tmp_path / "out")
    assert [(record.arm, record.seed) for record in result.failed] == [("student-lora", 1)]
    assert "killed by SIGKILL" in result.failed[0].error
    assert len(result.records) == 5
    gpus = {path.name: path.read_text() for path in seen.iterdir()}
    assert {gpus["fft-0"], gpus["student-lora-0"]} == {gpus["kd-lora-0"], gpus["kd-lora-1"]} == set(GPUS)
    for record in (one for one in result.records if one.status == "finished"):
        alone = next(one for one in experiment.records if (one.arm, one.seed) == (record.arm, record.seed))
        assert (record.score, record.history) == (alone.score, alone.history)
        assert any("2 runs at a time" in note for note in record.notes)
        logits = [
            read_predictions(one.layout.run(record.arm, record.seed).predictions).logits for one in (result, experiment)
        ]
        assert np.array_equal(*logits)


@pytest.mark.parametrize(
    ("shown", "count", "names"),
    [
        (None, 2, ["0", "1"]),
        ("3, 1", 2, ["3", "1"]),
        ("GPU-8932f937,GPU-d72d", 2, ["GPU-8932f937", "GPU-d72d"]),
        ("0,9,1", 1, ["0"]),
        ("MIG-1a,MIG-2b,MIG-3c", 1, ["MIG-1a", "MIG-2b", "MIG-3c"]),
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_gpus_are_named_as_the_caller_shows_them(shown, count, names, monkeypatch):
    """Numbered anew, runs would take the cards that the caller had hidden since they are somebody else's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert visible_gpus() == names


@pytest.mark.usefixtures("two_gpus")
def test_runs_are_shared_out_only_where_that_was_meant(workshop, monkeypatch):
    """Processes that train one run together would each start runs on all cards."""
    config = workshop.config({"run": {"device": "auto"}})
    assert engines.gpus_for(config) == GPUS
    assert engines.gpus_for(config, processes=2) == []
    assert engines.gpus_for(workshop.config({"run": {"device": "auto", "devices": "one"}})) == []
    assert engines.gpus_for(workshop.config({"run": {"device": "cpu"}})) == []
    monkeypatch.setattr(engines, "visible_gpus", lambda: GPUS[:1])
    assert engines.gpus_for(config) == []


@pytest.mark.parametrize("full", [GPUS[:1], GPUS])
def test_a_full_gpu_does_not_take_the_whole_queue(full, caplog):
    """It fails each run at once and is always the free one; where all fail, no run may be left out."""

    def work(_piece, _listen):
        gpu = children._own.get().environment["CUDA_VISIBLE_DEVICES"]
        if gpu not in full:
            time.sleep(0.05)
        return SimpleNamespace(error="OutOfMemoryError" if gpu in full else None)

    pieces = iter(range(10))
    done = list(engines.OnGpus(GPUS).results(work, lambda: next(pieces, None)))
    assert sorted(piece for piece, _ in done) == list(range(10))
    if full != GPUS:
        assert sum(result.error is not None for _, result in done) == 2
        assert "GPU GPU-first gets no more runs" in caplog.text


def test_an_arm_that_fails_leaves_its_gpu_in_use():
    """Two seeds of an arm that no card can hold took a good card out of the rest of the night."""

    def work(piece, _listen):
        time.sleep(0.0 if piece.arm == "fft" else 0.3)
        gpu = children._own.get().environment["CUDA_VISIBLE_DEVICES"]
        return SimpleNamespace(error="OutOfMemoryError" if piece.arm == "fft" else None, gpu=gpu)

    pieces = iter([SimpleNamespace(arm=arm) for arm in ("fft", "kd-lora", "fft", "kd-lora", "kd-lora", "kd-lora")])
    done = engines.OnGpus(GPUS).results(work, lambda: next(pieces, None))
    assert {result.gpu for piece, result in done if piece.arm == "kd-lora"} == set(GPUS)
