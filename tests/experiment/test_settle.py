"""What a config means: which runs in which order, and what it leaves open settled by rows and widths."""

from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

import tiny
from fabricate import BINARY
from kdlora.config import Kind, TrainConfig
from kdlora.configfile import build_config
from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.data.windows import WindowSettings
from kdlora.defaults import adapter_rate, epochs_for, full_rate
from kdlora.errors import ConfigError, ModelError
from kdlora.evidence.predictions import Predictions
from kdlora.experiment import settle
from kdlora.experiment.recording import prepare_process
from kdlora.experiment.run import plan_runs
from kdlora.experiment.scoring import measure_latency, unknown_classes
from kdlora.experiment.settle import (
    Chosen,
    ModelLook,
    choose_max_length,
    closed,
    look_at_models,
    settings_for,
    steps_for_labels,
)
from kdlora.models.encoders import load_encoder
from kdlora.system.environment import default_threads, describe_machine

CONFIG = {
    "data": {"train": "t.csv"},
    "task": {"text": "text", "label": "label"},
    "teacher": {"model": "t"},
    "student": {"model": "s"},
}


def test_the_longest_input_holds_99_percent_of_the_texts():
    """A fixed length cuts long texts in silence, or pads what need not be padded."""
    assert choose_max_length([np.array([40] * 98 + [61, 500])], [512]) == 64
    assert choose_max_length([np.array([20] * 100), np.array([33] * 100)], [512, 512]) == 40
    assert choose_max_length([np.array([300] * 100)], [512, 128]) == 128


def test_few_rows_get_more_passes_and_many_rows_fewer():
    """Fixed epochs leave a teacher of 300 rows half trained, and take days on 100,000."""
    assert [epochs_for("teacher", rows, 20, 32) for rows in (300, 1_500, 67_349)] == [30, 6, 2]
    assert [epochs_for("student", rows, 20, 32) for rows in (300, 67_349)] == [60, 4]
    assert epochs_for("teacher", 1_800, 770, 32) == 14, "77 classes are not learnt in as few steps as two"
    assert epochs_for("teacher", 405, 1_500, 32) == 115, "nor 150 classes of three rows each in 300 steps"
    assert epochs_for("student", 405, 1_500, 32) == 46, "though their student gains nothing by more than 600"
    assert epochs_for("teacher", 300, 10_000, 32) == 120, "1,000 classes take no thousand passes"
    names = Task("tokens", ("words",), ("tags",), tag_names(tuple("abcdef")), ("entity_f1",))
    assert epochs_for("teacher", 1_500, steps_for_labels(names, "teacher"), 32) == 13, (
        "nor are six types, where most words are none"
    )
    uneven: tuple[tuple[Kind, str, int, int], ...] = (
        ("single-label", "macro_f1", 77, 1540),
        ("single-label", "accuracy", 77, 770),
        ("single-label", "macro_f1", 2, 20),
        ("multi-label", "micro_f1", 28, 1120),
    )
    for kind, metric, labels, expected in uneven:
        many = Task(kind, ("text",), ("label",), tuple(map(str, range(labels))), (metric,))
        assert steps_for_labels(many, "teacher") == expected, "rare classes of many take a teacher longer"
        assert steps_for_labels(many, "student") == 10 * labels
    assert (full_rate(768), full_rate(384)) == (5e-5, 1e-4)  # a wider model takes a lower rate
    assert (adapter_rate(768), adapter_rate(384), adapter_rate(128)) == (5e-4, 1e-3, 3e-3)

    # Two processes with 16 rows each take the steps of one with 32.
    config = build_config(
        CONFIG | {name: CONFIG[name] | {"train": {"batch_size": 16}} for name in ("teacher", "student")}
    )
    config = Chosen({}, {"train": 640}, BINARY, processes=2).fill_in(config)
    assert (config.teacher.train.epochs, config.student.train.epochs) == (15, 30)

    # With 100 labelled rows a student would pass 150 times over 8,000 unlabelled texts.
    config = Chosen({}, {"train": 100, "unlabelled": 8000}, BINARY).fill_in(build_config(CONFIG))
    assert (config.teacher.train.epochs, config.student.train.epochs) == (75, 15)


def test_a_student_that_could_not_be_shipped_is_refused_first(tiny_model_folder, monkeypatch):
    """On a tokenizer of Python code a student was trained to the end, and then nothing could open it."""
    folder = str(tiny_model_folder("bert"))
    config = build_config(CONFIG | {"teacher": {"model": folder}, "student": {"model": folder}})
    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "is_fast", False)
    with pytest.raises(ModelError, match=r"student\.model.*choose a student with a tokenizer\.json"):
        look_at_models(config, BINARY, {"text": ["a film"]}, timed=False)


def test_only_what_is_null_is_settled():
    """A rate that the user set and that is replaced in silence is somebody else's experiment."""
    looks = {"teacher": ModelLook(np.array([64]), 512, 768), "student": ModelLook(np.array([64]), 512, 384)}
    chosen = Chosen(looks, {"train": 1500}, BINARY)
    config = chosen.fill_in(build_config(CONFIG | {"teacher": {"model": "t", "train": {"learning_rate": 1e-5}}}))
    assert (config.teacher.train.learning_rate, config.teacher.train.epochs) == (1e-5, 6)
    assert (config.student.train.max_length, config.student.train.learning_rate) == (64, 1e-3)
    assert settings_for(config, "lora").learning_rate == 5e-4
    windows = build_config(CONFIG | {"data": {"train": "a.csv", "long_texts": "windows"}})
    one = Chosen({"teacher": ModelLook(np.array([2000]), 512, 768)}, {"train": 90}, BINARY)
    lengths = [part.train.max_length for part in (one.fill_in(windows).teacher, one.fill_in(windows).student)]
    assert lengths == [512, None], "a student that is looked at by a later call reads what it can"
    assert settings_for(one.fill_in(windows), "lora").max_length == 512, "it is the teacher's model"
    settled = build_config(CONFIG | {"student": {"model": "s", "train": {"learning_rate": 1e-3}}})
    again = chosen.fill_in(settled, follows=False)
    assert settings_for(again, "lora").learning_rate == 5e-4, "a later call with another arm"
    assert settings_for(chosen.fill_in(settled), "lora").learning_rate == 1e-3, "a rate that is set holds, whichever"
    assert settings_for(config, "student-fft").learning_rate == 1e-4
    assert settings_for(config, "student-fft").head_learning_rate == config.teacher.train.head_learning_rate
    paper = chosen.fill_in(build_config(CONFIG | {"recipe": "paper"}))
    assert (paper.teacher.train.learning_rate, paper.student.train.epochs) == (2e-5, 5)
    assert settings_for(paper, "lora").learning_rate == settings_for(paper, "kd-lora").learning_rate == 5e-4
    with pytest.raises(ConfigError, match=r"train\.max_length is null"):  # else a traceback of the optimiser's
        closed(TrainConfig())

    # A control with another recipe than the distilled arm measures the recipe.
    config = build_config(CONFIG | {"student": {"model": "s", "train": {"epochs": 7}}})
    settings = {arm: settings_for(config, arm) for arm in ("kd-lora", "student-lora", "kd-fft", "student-fft")}
    assert settings["kd-lora"] == settings["student-lora"] == config.student.train
    assert settings["kd-fft"] == settings["student-fft"]
    assert settings["kd-fft"].learning_rate == config.student.full_learning_rate
    assert settings["kd-fft"].epochs == 7
    assert settings_for(config, "fft") == config.teacher.train


def test_the_time_of_a_token_is_that_of_usual_texts(tiny_model_folder, monkeypatch):
    """Short texts that were padded to the longest made minutes of training hours; so did threads that do not count."""
    made, clock = [], count()
    monkeypatch.setattr(settle, "predict_logits", lambda model, tokenizer, tokens, **_: made.append(tokens.dataset))
    monkeypatch.setattr(settle, "time", SimpleNamespace(process_time=lambda: next(clock) / 100))
    texts, found = {"text": ["film " * 12] * 90 + ["film " * 48] * 5 + ["film " * 12] * 5}, []
    for threads in (1, 4):
        run = {"arms": ["student-lora"], "device": "cpu", "precision": "fp32", "threads": threads}
        config = build_config(CONFIG | {"student": {"model": str(tiny_model_folder("bert"))}, "run": run})
        found.append(look_at_models(config, BINARY, texts)["student"])
    assert [np.unique(one.lengths).tolist() for one in found] == [[14, 50]] * 2
    assert {len(rows) for rows in made} == {4, 16, 64, 256}
    assert all(len(rows) * max(rows["length"]) < 1.5 * sum(rows["length"]) for rows in made)
    assert found[0].seconds == pytest.approx(0.01 / (14 * 256))
    assert found[1].seconds == pytest.approx(found[0].seconds / 4**0.85)


@pytest.mark.parametrize(("limit", "threads"), [("150000 100000\n", 2), ("max 100000\n", 8), (None, 8)])
def test_a_container_has_as_many_threads_as_it_may_use(tmp_path, monkeypatch, limit, threads):
    """64 threads on 2 processors wait for each other; an answer, or a training, takes many times as long."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.setattr("kdlora.system.environment._CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", (chosen := []).append)
    if limit is not None:
        (tmp_path / "cpu.max").write_text(limit)
    assert (default_threads(), describe_machine()["cores"]) == (threads, str(threads))
    prepare_process(build_config(CONFIG))
    assert chosen == ([2] if threads == 2 else [])  # a call may change bits, even with the number that there is
    prepare_process(build_config(CONFIG | {"run": {"threads": 4}}))
    assert chosen[-1] == 4


def test_a_class_that_the_teacher_never_gets_right_is_named():
    """A teacher that answers the largest class only scores well, and takes the rare ones from its student."""
    task = Task("single-label", ("text",), ("label",), ("common", "rare"), ("accuracy",))
    logits = np.tile(np.array([1.0, 0.0], np.float32), (8, 1))
    seen = Predictions(tuple("abcdefgh"), ("validation",) * 8, logits, task.label_names, np.array([0] * 5 + [1] * 3))
    assert unknown_classes(task, seen) == ["rare"]
    for rows, unknown in ((3, ["rare"]), (2, [])):
        several = replace(seen, labels=np.array([[1, 1]] * rows + [[1, 0]] * (8 - rows), np.float32))
        assert unknown_classes(replace(task, kind="multi-label"), several) == unknown


@pytest.mark.parametrize(
    ("teacher", "arms", "seeds", "expected"),
    [
        ({"model": "t"}, "kd-lora fft", [3, 1], ["fft 3", "fft 1", "kd-lora 3", "kd-lora 1"]),
        ({"model": "t", "seed": 1}, "fft kd-lora", [3, 1], ["fft 1", "fft 3", "kd-lora 3", "kd-lora 1"]),
        ({"model": "t", "seed": 9}, "fft", [3], ["fft 9", "fft 3"]),
        ({"model": "t", "tuning": "lora", "seed": 7}, "lora kd-lora", [0], ["lora 7", "lora 0", "kd-lora 0"]),
        ({"model": "t"}, "kd-fft", [2, 4], ["fft 2", "kd-fft 2", "kd-fft 4"]),
        ({"model": "t"}, "student-lora lora", [2], ["student-lora 2", "lora 2"]),
        ({"model": "t"}, "student-lora words kd-lora", [2], ["words 2", "fft 2", "student-lora 2", "kd-lora 2"]),
        ({"fine_tuned": "t"}, "kd-lora fft words", [3, 1], ["words 3", "fft 3", "kd-lora 3", "kd-lora 1"]),
        ({"logits": "t.parquet"}, "fft kd-lora", [0, 1], ["fft 0", "kd-lora 0", "kd-lora 1"]),
        ({"probabilities": "t.parquet"}, "kd-lora", [0], ["kd-lora 0"]),
    ],
)
def test_the_teacher_comes_first_and_only_once(teacher, arms, seeds, expected):
    """A teacher planned late leaves the students without logits; planned twice, it is the most expensive waste."""
    runs = plan_runs(build_config(CONFIG | {"teacher": teacher, "run": {"arms": arms.split(), "seeds": seeds}}))
    assert [f"{run.arm} {run.seed}" for run in runs] == expected


def test_latency_of_a_model_on_real_rows(tiny_model_folder):
    """Padding to the maximum or a model in training mode would time something that nobody runs."""
    encoder = load_encoder(str(tiny_model_folder("bert")), tiny.task(), seed=0)
    model, tokenizer = encoder.model.train(), encoder.tokenizer
    shapes: list[tuple[int, ...]] = []

    def watch(module: object, arguments: object, named: dict) -> None:
        assert not model.training
        shapes.append(tuple(named["input_ids"].shape))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    texts = {"text": ["good film", "bad", "a wonderful story " * 60], "text_pair": ["x", "y", "z"]}
    rows = Dataset.from_dict(texts)
    found = measure_latency(model, tokenizer, rows, max_length=16)
    assert [one.batch_size for one in found] == [1, 32]
    assert all(0 < one.p50_ms <= one.p95_ms and one.threads >= 1 for one in found)
    assert {shape[0] for shape in shapes} == {1, 32}
    assert max(shape[1] for shape in shapes) == 16
    assert min(shape[1] for shape in shapes) < 16
    assert model.training
    measure_latency(model, tokenizer, rows, max_length=512)
    assert max(shape[1] for shape in shapes) == tokenizer.model_max_length < 512

    # All windows are read, but never more of them at once than fit in memory.
    text, size = "good film " * 100, 200
    starts = [[5 * (place // 2) * 2 + 5 * (place % 2) for place in range(size)]] * 40
    words = Dataset.from_dict({"text": [text] * 40, "starts": starts, "ends": [[one + 4 for one in starts[0]]] * 40})
    long = Dataset.from_dict({"text": [text] * 40})
    for given, windows in ((words, None), (long, WindowSettings())):
        shapes.clear()
        measure_latency(model, tokenizer, given, max_length=16, windows=windows)
        assert 10 < shapes[0][0] <= max(shape[0] for shape in shapes) == 32
