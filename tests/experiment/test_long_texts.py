"""Texts longer than a model takes, in windows; decoders, and teachers that are tuned by adapters."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from experiments import FAST, answers, edit_json, predicted, read_rows
from fabricate import BINARY
from kdlora.configfile import build_config, load_config
from kdlora.data.tasks import Task
from kdlora.deploy.export import export_onnx
from kdlora.deploy.predict import Classifier
from kdlora.distil.inference import read_stored_logits
from kdlora.errors import ConfigError, ModelError
from kdlora.experiment import deployment
from kdlora.experiment.labelling import LabelSettings, label_collection
from kdlora.experiment.plan import reset_unused
from kdlora.experiment.run import run_experiment
from kdlora.experiment.scoring import evaluate_experiment
from kdlora.experiment.settle import Chosen, ModelLook, with_values
from kdlora.report.shipped import BenchmarkResult
from tiny import sentiment_rows, write_csv

TRAIN = {"epochs": 20, "batch_size": 8, "learning_rate": 5e-3}
WINDOWS = {"long_texts": "windows", "window_pool": "max", "window_stride": 4}


def long_rows(count, seed=0):
    """Rows whose label is in the last sentence; one in four has no other."""
    rows = sentiment_rows(count, seed)
    before = "the company said its profit rose by 12 percent in the third quarter "
    return [row | {"text": before * (place % 4 > 0) + row["text"]} for place, row in enumerate(rows)]


TEXTS = [row["text"] for row in long_rows(32, len("validation"))]


@pytest.fixture(scope="module")
def values(workshop, tmp_path_factory):
    """The sections of a config whose teacher reads every text whole, and whose student has windows of 16 tokens."""
    folder = tmp_path_factory.mktemp("long")
    files = {name: str(write_csv(folder / f"{name}.csv", long_rows(32, len(name)))) for name in ("train", "validation")}
    return workshop.values(
        {
            "data": files | WINDOWS,
            "teacher": {"train": TRAIN | {"epochs": 4, "max_length": 64}},
            "student": {"full_learning_rate": 1e-2, "train": TRAIN | {"max_length": 16}},
            "distil": {"alpha": 0.9},
            "run": {"arms": ["fft", "kd-fft"]},
            "export": {"formats": ["onnx", "onnx-int8"], "min_agreement": 0.5, "max_metric_drop": 50},
        }
    )


@pytest.fixture(scope="module")
def result(values, tmp_path_factory):
    return run_experiment(build_config(values), tmp_path_factory.mktemp("long-run") / "out")


def test_what_is_scored_exported_and_served_is_one_answer(result, values):
    """A student that is scored in windows and served cut, or pooled otherwise, is not the one of the report."""
    layout = result.layout
    assert [record.status for record in result.records] == ["finished", "finished"]
    assert not any(any(record.truncated.values()) for record in result.records)
    scored = predicted(layout, "kd-fft").logits
    assert result.records[-1].score > 70  # which the beginnings of the texts cannot give
    for folder, precision in ((layout.student, "auto"), (layout.onnx, "fp32")):
        model = Classifier.load(folder, precision=precision)
        assert (model.folder.max_length, model.folder.windows.stride, model.folder.windows.pool) == (16, 4, "max")
        np.testing.assert_allclose(model.predict_logits(TEXTS), scored, atol=1e-4)
        np.testing.assert_allclose(model.predict_logits(TEXTS, batch_size=1), scored, atol=1e-4)
    assert "pools their logits (max); the pipeline below cuts it" in (layout.student / "README.md").read_text()
    int8 = Classifier.load(layout.onnx).predict_logits(TEXTS)
    assert np.corrcoef(int8.ravel(), scored.ravel())[0, 1] > 0.9
    again = evaluate_experiment(layout.root, values["data"]["validation"])
    assert [row["score"] for row in again] == [
        pytest.approx(next(one.score for one in result.records if one.arm == arm)) for arm in ("kd-fft", "fft")
    ]


def test_a_teacher_that_would_be_cut_is_not_measured(result, values, tmp_path, monkeypatch):
    """A given folder knows no windows: its time and score were those of the beginnings of the texts."""
    given, asked = shutil.copytree(result.layout.teacher, tmp_path / "teacher"), []
    monkeypatch.setattr(deployment, "benchmark", lambda models, *_, **more: asked.append(models) or BenchmarkResult())
    config, layout = load_config(result.layout.config), result.layout
    splits = deployment.load_without_copies(config, layout)
    own = json.loads((given / "config.json").read_text())["kdlora_task"]
    for task in (None, own):
        edit_json(given / "config.json", kdlora_task=task)
        wished = with_values(config, {"teacher.fine_tuned": str(given)})
        deployment._benchmark_student(wished, layout, splits, print)
    assert ["teacher" in models for models in asked] == [False, True]


def test_a_collection_is_labelled_as_the_teacher_was_trained(result, values, tmp_path):
    """Labels of texts that are cut would teach what the teacher of the experiment never said."""
    model, texts = str(result.layout.teacher), values["data"]["validation"]
    for longest, asked in ((64, None), (16, 16), (16, None)):  # as the model was trained, as asked, as it was begun
        settings = LabelSettings(max_length=asked, precision="fp32")
        labelled = label_collection(model, texts, tmp_path / f"{longest}", settings)
        assert (labelled.truncated, labelled.max_length) == (0, longest)
        table = pq.read_table(next(labelled.folder.glob("*.parquet")))
        found = np.stack([table[f"logit:{name}"] for name in ("negative", "positive")], axis=1)
        expected = Classifier.load(result.layout.teacher, max_length=longest).predict_logits(TEXTS)
        np.testing.assert_allclose(found, expected, atol=1e-4)
        if longest == 64:
            np.testing.assert_allclose(found, predicted(result.layout, "fft").logits, atol=1e-4)
    remedy = r"max_length is 128, but .* reads 64 tokens at most"
    with pytest.raises(ConfigError, match=remedy):
        label_collection(model, texts, tmp_path / "more", LabelSettings(max_length=128))


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"data": {"window_stride": 16}}, r"data.window_stride: 16 is not below student.train.max_length \(16\)"),
        ({"data": {"long_texts": "cut"}}, "are of windows; set data.long_texts to windows"),
        ({"data": {"window_pool": "sum"}}, "data.window_pool.*'mean' or 'max'"),
    ],
)
def test_faults_of_a_config_are_told_before_anything_is_loaded(values, changes, fault):
    """A stride that leaves a window where it was would never end; a pool without windows would do nothing."""
    with pytest.raises(ConfigError, match=fault):
        build_config(values | {key: values[key] | part for key, part in changes.items()})


def test_what_only_data_and_models_tell_stops_the_plan(values, cli, tmp_path):
    """A run that begins and dies at its first student has cost a teacher."""
    pairs = write_csv(tmp_path / "pairs.csv", [row | {"other": "a"} for row in long_rows(24)])
    words = tmp_path / "words.conll"
    words.write_text("Ada\tB-PER\nmet\tO\n\nOslo\tB-LOC\n\n" * 6)
    cases = [
        ({"student": {"train": TRAIN | {"max_length": 65}}}, "max_length is 65, but", "reads 64 tokens at most"),
        ({"data": {"window_stride": 15}}, "data.window_stride is 15", "set it to 13 at most"),
        ({"data": {"train": str(pairs)}, "task": {"text": ["text", "other"]}}, "pairs (text, other)", "cut"),
        ({"data": {"train": str(words), "validation": str(words)}}, "tasks of tokens always", "out"),
    ]
    for changes, *said in cases:
        path, config = tmp_path / "config.yaml", {key: values[key] | part for key, part in changes.items()}
        path.write_text(yaml.safe_dump(values | config), encoding="utf-8")
        ended = cli("run", path, "--out", tmp_path / "out", code=2)
        assert all(part in ended.err for part in said), ended.err
        assert not (tmp_path / "out").exists()


def test_the_plan_names_the_remedy_and_each_model_has_its_own_length(values, cli, tmp_path):
    """Nobody learns from a share of cut texts that they need not be; a teacher cut like its student is no better."""
    path = tmp_path / "config.yaml"
    data = {key: value for key, value in values["data"].items() if not key.startswith(("window", "long"))}
    open_lengths = {role: values[role] | {"train": TRAIN} for role in ("teacher", "student")}
    student = {"student": values["student"] | {"train": TRAIN | {"max_length": 16}}}
    for changes, said in (
        ({"data": data, **student}, "are cut; data.long_texts: windows reads all of them"),
        (student, "are read in windows"),
    ):
        path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        line = next(line for line in cli("run", path, "--dry-run").out.splitlines() if line.startswith("max_length"))
        assert line.endswith(said), line
    looks = {"teacher": ModelLook(np.array([3000]), 8192, 768), "student": ModelLook(np.array([3000]), 512, 384)}
    chosen = Chosen(looks, {"train": 100}, BINARY)
    for long_texts, lengths in (("cut", (512, 512)), ("windows", (3000, 512))):
        config = build_config(values | open_lengths | {"data": data | {"long_texts": long_texts}})
        filled = chosen.fill_in(config)
        assert (filled.teacher.train.max_length, filled.student.train.max_length) == lengths


def test_decoders_teach_by_merged_adapters_and_predict_what_was_scored(
    workshop, tiny_model_folder, tmp_path, monkeypatch
):
    """All weights would be tuned after all, or the base without its adapter asked for the logits.

    Served with other padding or without it, a student answers otherwise than in its report.
    """
    llama = tiny_model_folder("llama")
    teacher = {"model": str(llama), "tuning": "lora", "adapter_learning_rate": 1e-2, "train": FAST | {"max_length": 64}}
    run = {"arms": ["kd-lora", "student-lora"]}
    config = workshop.config({"student": {"model": str(llama)}, "teacher": teacher, "run": run})
    plans = []
    result = run_experiment(config, tmp_path / "out", before=plans.append)
    layout = result.layout
    assert [one.arm for one in plans[0].trainings] == ["lora", "student-lora", "kd-lora"]
    assert [record.status for record in result.records] == ["finished"] * 3
    own = {record.arm: record for record in result.records}
    assert own["lora"].trainable_parameters < own["lora"].total_parameters / 2
    assert own["lora"].history[-1]["epoch"] == 2  # of teacher.train
    texts = [row["text"] for row in read_rows(workshop.validation)]
    for folder, arm in ((layout.teacher, "lora"), (layout.student, result.shipped.arm)):
        scored = predicted(layout, arm)
        np.testing.assert_allclose(answers(folder, texts), scored.logits, atol=1e-4)
    np.testing.assert_allclose(Classifier.load(layout.student).predict_logits(texts), scored.logits, atol=1e-4)
    stored = read_stored_logits(layout.teacher_logits, Task.from_dict(own["lora"].task))
    texts = [row["text"] for row in read_rows(workshop.train)]
    np.testing.assert_allclose(answers(layout.teacher, texts), stored.logits, atol=1e-4)
    assert any(name.endswith("teacher/model.safetensors") for name in own["lora"].files)

    # It is measured all the same, and the teacher, which reads less than the student, not scored once more.
    asked = []
    monkeypatch.setattr(deployment, "benchmark", lambda *_, **given: asked.append(given) or BenchmarkResult())
    wished = with_values(config, {"export.formats": ("onnx",), "export.benchmark": True})
    with pytest.raises(ZeroDivisionError):  # and the plan says so, before the hours
        run_experiment(wished, tmp_path / "planned", before=lambda plan: plans.append(plan) or 1 / 0)
    assert [any("only encoders are exported" in note for note in one.notes) for one in plans] == [False, True]
    notes = deployment.deploy_student(wished, layout, print)
    assert [note for note in notes if "only encoders are exported to ONNX" in note]
    assert (asked[0]["max_length"], asked[0]["scores"]) == (None, {"teacher": own["lora"].score})
    with pytest.raises(ModelError, match=r"is a decoder .*only encoders"):
        export_onnx(layout.student, tmp_path / "onnx", formats=("onnx",))

    # Without `fft` the report would say that there is no score of a teacher.
    report = layout.report_md.read_text()
    assert f"{llama.name} (LoRA)" in report
    assert "there is no score of a teacher" not in report

    # A teacher in another arm's folder, not found, would be trained anew at every call.
    before = layout.run("lora", 0).record.stat().st_mtime_ns
    again = run_experiment(config, layout.root)
    assert len(again.records) == 3
    assert layout.run("lora", 0).record.stat().st_mtime_ns == before


def test_who_teaches_counts_for_a_suite_and_is_among_the_arms(workshop):
    """Runs by another teacher, or at another seed, would be taken for equal ones."""
    values = {"teacher": {"tuning": "lora", "seed": 7}, "run": {"arms": ["fft", "lora", "kd-lora"], "seeds": [0, 1]}}
    config = workshop.config(values)
    assert reset_unused(config, "lora").teacher == config.teacher
    assert reset_unused(workshop.config(values | {"teacher": {"seed": 7}}), "lora").teacher.seed is None
    data = {"data": {"train": "rows.csv"}, "student": {"model": "small"}}
    tuned = {**data, "teacher": {"model": "large", "tuning": "lora"}}
    assert build_config(tuned).run.arms == ("words", "lora", "kd-lora", "kd-fft", "student-lora")
    assert build_config(tuned | {"recipe": "paper"}).run.arms == ("words", "lora", "kd-lora", "student-lora")
    with pytest.raises(ConfigError, match=r"teacher\.fine_tuned gives one"):
        build_config({**data, "teacher": {"fine_tuned": "large", "tuning": "lora"}})
