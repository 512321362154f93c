"""The benchmark: every model in its own process, in the same rounds, scored by label name."""

import json
import shutil
import signal
from dataclasses import asdict

import pytest

from deploy_folders import TEXTS
from kdlora.data.tasks import Task
from kdlora.deploy import benchmark as module
from kdlora.deploy.benchmark import benchmark
from kdlora.deploy.gates import LabelledTexts
from kdlora.deploy.predict import Classifier
from kdlora.errors import ModelError

TASK = Task("single-label", ("text",), ("label",), ("positive", "neutral", "negative"), ("accuracy",))
QUICK = {"rounds": 2, "threads": 1, "batch_sizes": (4, 8)}


def test_figures_of_all_models(classifier_folder, exported):
    """Prevents a table with a model, a unit or a percentile mixed up, and a score of the wrong column."""
    labels = [TASK.label2id[one.label] for one in Classifier.load(classifier_folder()).predict(TEXTS)]
    models = {"student": classifier_folder(), "fp32": exported() / "model.onnx", "int8": exported()}
    told = []
    given = LabelledTexts(TEXTS, labels, TASK)
    result = benchmark(models, given, **QUICK, scores={"int8": 12.5}, progress=told.append)
    # Of hours that a long test split takes, nobody knew what they were for.
    assert told[-2:] == [f"{name}: scored on {len(TEXTS)} texts" for name in ("student", "fp32")]
    student, fp32, int8 = result.models
    assert [model.backend for model in result.models] == ["transformers", "onnx", "onnx"]
    assert [model.precision for model in result.models] == ["fp32", "fp32", "int8"]
    assert int8.size_bytes < fp32.size_bytes
    for model in result.models:
        assert 0 < model.p50_ms <= model.p95_ms <= model.p99_ms < 5000
        assert model.texts_per_second > 0
        assert model.batch_size in (4, 8)
        assert model.load_seconds > 0
        assert model.peak_memory_bytes is None or model.peak_memory_bytes > 0
    assert student.name == "student"
    assert int8.score == 12.5  # it is known
    assert student.score == fp32.score == 100  # the task lists the labels in another order than the model
    json.dumps(asdict(result))


def test_models_of_pairs_are_timed_on_pairs(trained_on, exported):
    """Times of half of what a model reads, beside another model's of the whole."""
    pairs = trained_on("premise", "hypothesis")
    shutil.copy(exported() / "model.onnx", pairs)  # PyTorch takes seconds to import
    assert benchmark([pairs], **QUICK | {"rounds": 1}).models[0].p50_ms > 0
    with pytest.raises(ModelError, match="some of the models read pairs of texts and some single ones"):
        benchmark([trained_on("review"), pairs], **QUICK)


def test_a_slow_model_reads_little(exported, monkeypatch):
    """A teacher took half of the time: 100 texts alone and three batch sizes, in each of three rounds."""
    ask, asked = module.ModelProcess.ask, []

    def note(self, do, **arguments):
        if do == "time" and "batches" in arguments:
            asked.append((self.name, arguments.get("batch_size"), len(arguments["batches"])))
        return ask(self, do, **arguments)

    monkeypatch.setattr(module.ModelProcess, "ask", note)
    monkeypatch.setattr(module, "_LEAST_SECONDS", 1e-9)
    paces = {"slow": 1.0, "fast": 1e-3}
    monkeypatch.setattr(
        module.ModelProcess, "pace", property(lambda self: paces[self.name], lambda self, _: None), raising=False
    )
    result = benchmark(dict.fromkeys(paces, exported()), TEXTS[:8], **QUICK)
    for model, (alone, batches) in zip(result.models, (([4, 4], 3), ([8, 8], 4)), strict=True):
        mine = [(size, count) for name, size, count in asked if name == model.name]
        assert [count for size, count in mine if size is None][1:] == alone, "after the warm-up"
        sizes = [size for size, _ in mine if size is not None][1:]
        assert (sizes[:2], len(sizes)) == ([4, 8], batches)
        assert set(model.speeds) == {1, 4, 8}


def test_dead_process_is_named(exported, monkeypatch):
    """Prevents a benchmark that waits for ever for a process that was killed."""
    ask = module.ModelProcess.ask

    def kill_first(self, do, **arguments):
        if do == "memory":
            self.process.kill()
        return ask(self, do, **arguments)

    monkeypatch.setattr(module.ModelProcess, "ask", kill_first)
    with pytest.raises(ModelError, match="its process ended with code -9 during 'memory'"):
        benchmark({"int8": exported()}, TEXTS[:4], **QUICK)


def test_a_model_leaves_ctrl_c_to_the_command(exported, monkeypatch):
    """A terminal sends it to both processes, and the model's one showed a traceback."""
    ask = module.ModelProcess.ask

    def interrupt_first(self, do, **arguments):
        if do == "memory":
            self.process.send_signal(signal.SIGINT)
        return ask(self, do, **arguments)

    monkeypatch.setattr(module.ModelProcess, "ask", interrupt_first)
    assert benchmark({"int8": exported()}, TEXTS[:4], **QUICK).models[0].p50_ms > 0
