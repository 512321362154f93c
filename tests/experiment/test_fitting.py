"""`kdlora thresholds`, what it does to a model's answers, and what a config asks for after the export."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tiny
from experiments import copy_experiment, edit_json, flags, numbered, read_rows, snapshot
from kdlora.data.tasks import Task
from kdlora.deploy.decisions import Decisions, read_decisions, write_decisions
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.errors import DataError, ModelError
from kdlora.evidence.defer import settle_goals
from kdlora.evidence.metrics import compute_metrics
from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_record, write_record
from kdlora.experiment import deployment
from kdlora.experiment.deployment import benchmark_models, load_without_copies
from kdlora.experiment.fitting import fit_thresholds
from kdlora.experiment.recording import shipped_record
from kdlora.experiment.run import run_experiment
from kdlora.report.report import make_report

NAMES = ("film", "music", "praise")
EXPORT = {"formats": ["onnx", "onnx-int8"], "benchmark": False, "min_agreement": 0.0, "max_metric_drop": 100.0}


@pytest.fixture(scope="module")
def finished(workshop, made_once) -> Path:
    """A multi-label experiment with a test split and both exports, and beside it one with thresholds; read only."""

    def make(folder: Path) -> Path:
        rows = {"train": flags(numbered(64, 1)), "validation": flags(numbered(200, 2)), "test": flags(numbered(120, 3))}
        files = {name: str(tiny.write_csv(folder / f"{name}.csv", table)) for name, table in rows.items()}
        sections = {"data": files, "task": {"label": NAMES}, "export": EXPORT}
        root = run_experiment(workshop.config(sections), folder / "experiment").layout.root
        fit_thresholds(copy_experiment(root, folder / "fitted"), "f1")
        make_report(folder / "fitted")
        return root

    return made_once("thresholds", make)


@pytest.fixture
def fitted(finished: Path, tmp_path: Path) -> Path:
    """A copy of the one with thresholds, free to be changed."""
    return copy_experiment(finished.parent / "fitted", tmp_path / "experiment")


def read(folder: Path, file: str = "safetensors") -> dict[str, float]:
    """Read the thresholds of a file."""
    place = folder / ("student" if file == "safetensors" else "student-onnx") / "kdlora_decisions.json"
    return json.loads(place.read_text())[file]["thresholds"]


def goals(folder: Path) -> dict[str, str]:
    """Read what each label's threshold was fitted for."""
    labels = json.loads((folder / "thresholds.json").read_text())["models"][0]["labels"]
    return {one["label"]: one["goal"] for one in labels}


def test_an_export_is_judged_by_the_threshold_of_its_run(fitted: Path, tmp_path: Path, monkeypatch) -> None:
    """At 0.5, where a student that doubts says little, another file says as little."""
    layout, asked = ExperimentLayout(fitted), []
    record = shipped_record(layout)
    write_record(layout.run(record.arm, record.seed).record, record.model_copy(update={"threshold": 0.3}))
    monkeypatch.setattr(deployment, "export_onnx", lambda *_, texts, **__: asked.append(texts.thresholds))
    deployment.export_model(fitted, tmp_path / "onnx")
    assert asked == [pytest.approx(dict.fromkeys(NAMES, 0.3))]


def test_every_file_answers_by_its_own_thresholds(fitted: Path, tmp_path: Path, cli) -> None:
    """Int8 shifts outputs, and one file's thresholds on another's would say labels that nobody judged."""
    texts = [row["text"] for row in flags(numbered(60, 4))]
    for file in ("safetensors", "model.onnx", "model_quantized.onnx"):
        place = fitted / "student" if file == "safetensors" else fitted / "student-onnx" / file
        model, thresholds = Classifier.load(place), read(fitted, file)
        assert set(thresholds) == set(NAMES)
        for answer in model.predict(texts):
            assert answer.label == tuple(name for name in NAMES if answer.probabilities[name] > thresholds[name])
        plain = Classifier.load(place, decisions="none").predict(texts)
        assert all(one.label == tuple(n for n in NAMES if one.probabilities[n] > 0.5) for one in plain)
    assert read(fitted, "model.onnx") != read(fitted, "model_quantized.onnx")
    source = tiny.write_csv(tmp_path / "texts.csv", [{"text": text} for text in texts])
    cli("predict", fitted / "student-onnx", source, "--to", tmp_path / "said.csv")
    said = [row["label"] for row in read_rows(tmp_path / "said.csv")]
    assert said == ["|".join(one.label) for one in Classifier.load(fitted / "student-onnx").predict(texts)]


def test_one_threshold_decides_for_all_labels(workshop, tmp_path: Path, cli) -> None:
    """Rare labels were hardly ever said: above 0.5 a model that doubts has fewer of them right than it could."""
    rows = {"train": flags(numbered(64, 1)), "validation": flags(numbered(60, 2)), "test": flags(numbered(40, 3))}
    files = {name: str(tiny.write_csv(tmp_path / f"{name}.csv", table)) for name, table in rows.items()}
    task, arms = {"label": NAMES, "metric": "macro_f1"}, ["fft", "student-lora"]
    sections = {"data": files, "task": task, "export": EXPORT, "run": {"arms": arms}}
    layout = run_experiment(workshop.config(sections), tmp_path / "experiment").layout
    student, teacher = shipped_record(layout), read_record(layout.run("fft", 0).record)
    assert student.threshold != 0.5
    for file in ("safetensors", "model.onnx", "model_quantized.onnx"):
        assert read(layout.root, file) == pytest.approx(dict.fromkeys(NAMES, student.threshold))
    kept = read_predictions(layout.run(student.arm, student.seed).predictions)
    said = Classifier.load(layout.student).predict([row["text"] for row in rows["test"]])
    assert [[name in one.label for name in NAMES] for one in said] == (kept.only("test").decided > 0).tolist()
    for split, score in (("validation", student.score), ("test", student.test_score)):
        part = kept.only(split)
        by, plain = (
            compute_metrics(Task.from_dict(student.task), one, part.labels)["macro_f1"]
            for one in (part.decided, part.logits)
        )
        assert 100 * by == pytest.approx(score)
        assert by > plain or split == "test"
    scored = {
        one["model"]: one["score"] for one in json.loads(cli("evaluate", layout.root, files["test"], "--json").out)
    }
    assert scored == pytest.approx({"student": student.test_score, "teacher": teacher.test_score})
    # The benchmark of both had the student by its threshold and the teacher by 0.5.
    folder = read_model_folder(layout.teacher)
    assert read_decisions(folder).thresholds == pytest.approx(teacher.thresholds())
    edit_json(layout.teacher / "config.json", kdlora_temperature=2.0)  # as of one that was given, and calibrated
    again = json.loads(cli("evaluate", layout.root, files["test"], "--json").out)
    assert {one["model"]: one["score"] for one in again} == pytest.approx(scored)
    assert "By fitted thresholds, the student's:" in cli("evaluate", layout.root, files["test"]).out
    assert "suits the score on validation best" in (layout.student / "README.md").read_text()
    fit_thresholds(layout.root, {"film": "f1"})
    assert "suits the score on validation best" not in (layout.student / "README.md").read_text()
    assert [read(layout.root)[name] for name in NAMES[1:]] == pytest.approx([student.threshold] * 2)
    assert [one["label"] for one in json.loads(layout.thresholds.read_text())["models"][0]["labels"]] == ["film"]


def test_the_figures_are_those_of_the_test_rows(fitted: Path, finished: Path) -> None:
    """Figures of the rows that the thresholds were fitted on are too good, and were told as if they were not.

    Those of every label are of no thresholds, and were told as if they were of what ships.
    """
    rows = flags(numbered(120, 3))
    found = json.loads((fitted / "thresholds.json").read_text())
    assert (found["source"], found["judged"], found["rows"]) == ("test", 120, 200)
    said = Classifier.load(fitted / "student").predict([row["text"] for row in rows])
    for label in found["models"][0]["labels"]:
        has = np.array([row[label["label"]] for row in rows]) == 1
        gets = np.array([label["label"] in one.label for one in said])
        assert (label["said"], label["right"]) == (gets.sum(), (gets & has).sum())
    report = (fitted / "report.md").read_text()
    assert "Above which probability a label is said" in report
    assert "120 rows of the test split" in report
    assert "These figures are without fitted thresholds, by which the shipped student answers." in report
    assert "These figures are without" not in (finished / "report.md").read_text()
    card = (fitted / "student" / "README.md").read_text()
    assert f"film is said above a probability of {read(fitted)['film']:.4f}" in card


def test_a_test_split_of_known_texts_judges_nothing_and_ends_nothing(fitted: Path, monkeypatch) -> None:
    """No threshold could be fitted, although it is fitted on validation rows."""

    def load(*given):
        splits = load_without_copies(*given)
        return replace(splits, test=splits.validation)

    monkeypatch.setattr("kdlora.experiment.fitting.load_without_copies", load)
    found = fit_thresholds(fitted)
    assert (found.source, found.judged) == ("validation", 200)
    assert "all 200 texts of the test split are training, validation or unlabelled texts" in " ".join(found.notes)


def test_scores_are_those_of_the_answers_by_thresholds(fitted: Path, finished: Path, cli, monkeypatch) -> None:
    """A score of other answers than those that the same folder gives."""
    rows, told = finished.parent / "test.csv", json.loads((fitted / "thresholds.json").read_text())["models"]
    assert [one["score_before"] != one["score_after"] for one in told[:2]] == [True, True]
    (student,) = json.loads(cli("evaluate", fitted, rows, "--json").out)
    assert student["thresholds"] == read(fitted)
    assert student["score"] == pytest.approx(told[0]["score_after"])
    assert f"film {read(fitted)['film']:.4f}" in cli("evaluate", fitted, rows).out
    monkeypatch.setattr("kdlora.deploy.benchmark._LEAST_SECONDS", 0.01)
    done = benchmark_models([fitted / "student-onnx" / "model.onnx"], data=str(rows), threads=1)
    assert done.models[0].score == pytest.approx(told[1]["score_after"])
    assert "By fitted thresholds: the score of" in done.table().note


def test_a_precision_of_one_label_leaves_the_others(fitted: Path, cli) -> None:
    """A second call that forgot the first would put labels back to 0.5 without a word."""
    before = read(fitted)
    told = json.loads((fitted / "thresholds.json").read_text())
    assert json.loads(cli("thresholds", fitted, "--metric", "f1", "--json").out) == told
    done = cli("thresholds", fitted, "--precision", "0.4", "--label", "praise")
    after = read(fitted)
    assert {name: after[name] for name in ("film", "music")} == {name: before[name] for name in ("film", "music")}
    assert "precision 0.4" in done.out
    cli("thresholds", fitted, "--metric", "f1", "--label", "film")
    assert goals(fitted)["praise"] == "precision 0.4"
    kept = snapshot(fitted)
    refused = cli("thresholds", fitted, "--precision", "0.999", "--label", "praise", code=2)
    assert "no threshold reaches a precision of 0.999 on 200 rows" in refused.err
    assert snapshot(fitted) == kept

    # One label of few rows kept all others from being fitted.
    after = read(fitted)
    notes = " ".join(fit_thresholds(fitted, {"praise": 0.999, "music": "accuracy"}).notes)
    assert "'praise' keeps its threshold in student: no threshold reaches a precision of 0.999 on 200 rows" in notes
    assert {name for name, value in read(fitted).items() if value != after[name]} == {"music"}
    assert goals(fitted) == {"film": "f1", "music": "accuracy", "praise": "precision 0.4"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--label", "musik"], "no label 'musik'; there are film, music, praise. Did you mean 'music'?"),
        (["--metric", "f2"], "unknown metric 'f2'"),
        (["--precision", "1.5"], "a precision must be above 0 and below 1, got 1.5"),
        (["--precision", "0.5", "--metric", "f1"], "two goals"),
    ],
)
def test_what_cannot_be_fitted_is_refused(finished: Path, cli, arguments: list[str], told: str) -> None:
    """A misspelt label or metric would leave 0.5 in force, at exit 0."""
    refused = cli("thresholds", finished, *arguments, code=2)
    assert told in refused.err
    assert not (finished / "thresholds.json").exists()


def test_a_label_without_rows_keeps_a_half(finished: Path, tmp_path: Path, cli) -> None:
    """One rare label would keep all others from being fitted, or get a threshold out of nothing."""
    folder = copy_experiment(finished, tmp_path / "experiment")
    rows = [row | {"music": 0} for row in flags(numbered(200, 2))]
    config = (folder / "config.yaml").read_text()
    other = tiny.write_csv(tmp_path / "validation.csv", rows)
    (folder / "config.yaml").write_text(config.replace(str(finished.parent / "validation.csv"), str(other)))
    done = cli("thresholds", folder, "--metric", "f1")
    assert "'music' keeps 0.5: none of 200 rows have the label" in " ".join(done.out.split())
    assert set(read(folder)) == {"film", "praise"}
    cli("thresholds", folder, "--precision", "0.4")
    assert set(read(folder)) == {"film", "praise"}
    refused = cli("thresholds", folder, "--label", "music", code=2)
    assert "none of 200 rows have the label" in refused.err


def test_a_threshold_that_costs_the_tasks_score_is_left_out(finished: Path, tmp_path: Path, monkeypatch) -> None:
    """A rare label that was hardly learnt was said of most texts for its own F1, at half the score of the task."""
    folder, texts = copy_experiment(finished, tmp_path / "experiment"), [row["text"] for row in flags(numbered(200, 2))]
    logits = Classifier.load(folder / "student").predict_logits(texts)
    ranks, rare = logits.argsort(axis=0).argsort(axis=0), int(logits.mean(axis=0).argmin())
    labels = (ranks >= 100).astype(np.float32)
    labels[:, rare] = np.isin(ranks[:, rare], (0, 100))

    def load(*given):
        splits = load_without_copies(*given)
        rows = splits.validation.remove_columns("label").add_column("label", labels.tolist())
        return replace(splits, validation=rows, test=None)

    monkeypatch.setattr("kdlora.experiment.fitting.load_without_copies", load)
    told = f"{NAMES[rare]!r}: such a threshold in student lowers the task's own score on validation, and is"
    found = fit_thresholds(folder)
    assert f"{told} left out" in " ".join(found.notes)
    assert set(NAMES) - set(read(folder)) == {NAMES[rare]}
    assert all(one.score_after >= one.score_before for one in found.models)
    asked = fit_thresholds(folder, "f1")
    assert f"{told} kept, as it was asked for" in " ".join(asked.notes)
    assert set(read(folder)) == set(NAMES)
    assert asked.models[0].score_after < found.models[0].score_after - 20


def test_thresholds_of_other_weights_are_refused(fitted: Path) -> None:
    """Thresholds of fp32 would be applied to int8, or those of a model that is gone to the one in its place."""
    place = fitted / "student-onnx" / "kdlora_decisions.json"
    kept = json.loads(place.read_text())
    place.write_text(json.dumps({"model.onnx": kept["model.onnx"]}))
    with pytest.raises(ModelError, match=r"fitted for model.onnx, not model_quantized.onnx\. Remove the file"):
        Classifier.load(fitted / "student-onnx")
    place.write_text(json.dumps({"model_quantized.onnx": kept["model.onnx"]}))
    with pytest.raises(ModelError, match="fitted for other weights"):
        Classifier.load(fitted / "student-onnx")
    for fault, told in (
        ({"thresholds": {"film": 1.0}}, "above 0 and below 1"),
        ({"thresholds": {"film": True}}, "above 0 and below 1"),
        ({"thresholds": {"tennis": 0.5}}, "expected labels of the model .* got {'tennis': 0.5}"),
        ({"thresholds": ["film"]}, "damaged at thresholds"),
        ({"promise": {"error": "low"}}, r"damaged at promise\.error"),
    ):
        place.write_text(json.dumps({"model_quantized.onnx": kept["model_quantized.onnx"] | fault}))
        with pytest.raises(ModelError, match=told):
            Classifier.load(fitted / "student-onnx")
    assert Classifier.load(fitted / "student-onnx", decisions="none").predict(["a film"])


def test_a_config_decides_once_and_takes_it_back(workshop, tmp_path: Path) -> None:
    """A promise that every call makes anew costs minutes; one that outlives its config answers by what nobody set."""
    rows = {"train": tiny.sentiment_rows(64), "test": tiny.sentiment_rows(150, seed=7)}
    rows["test"] = [row | {"text": f"{row['text']} ({place})"} for place, row in enumerate(rows["test"])]
    files = {name: str(tiny.write_csv(tmp_path / f"{name}.csv", table)) for name, table in rows.items()}
    export = EXPORT | {"formats": ["onnx"]}

    def run(**sections):
        config = workshop.config({"data": files, "export": export} | sections)
        return run_experiment(config, tmp_path / "out")

    layout = run(export=export | {"thresholds": "f1"}, defer={"error": 0.7}).layout
    model = Classifier.load(layout.student)
    assert set(model.decisions.thresholds) == {"positive"}
    assert model.decisions.promise is not None
    assert model.decisions.promise.error == 0.7
    assert "every text is answered: of the answers, 100.0%" in (layout.student / "README.md").read_text()
    places = (layout.student, layout.onnx, layout.thresholds, layout.deferral)
    before = [place.stat().st_mtime_ns if place.is_file() else snapshot(place) for place in places]
    run(export=export | {"thresholds": "f1"}, defer={"error": 0.7})
    assert [place.stat().st_mtime_ns if place.is_file() else snapshot(place) for place in places] == before
    notes = run(defer={"error": 0.0001}).notes
    assert any("No error rate is promised (defer)" in note and "cannot be promised" in note for note in notes)
    assert Classifier.load(layout.student).decisions == Decisions()
    assert not layout.thresholds.exists()
    write_decisions(model.folder, model.decisions)
    run()
    assert not list(layout.root.rglob("kdlora_decisions.json"))


@pytest.mark.parametrize(
    ("metric", "goal", "expected"),
    [
        ("recall@0.9:ham", None, {"ham": 0.9}),
        ("recall@.95:spam", None, {"spam": 0.95}),
        ("recall@0.9:ham", 0.5, {"ham": 0.5}),
        ("recall@0.9:ham", {"spam": None}, {"spam": "f1"}),
        ("f1:ham", None, {"ham": "f1"}),
        ("average_precision:ham", None, {"ham": "f1"}),
        ("average_precision:ham", 0.5, {"ham": 0.5}),
        ("matthews", None, {"spam": "matthews"}),
        ("accuracy", 0.8, {"spam": 0.8}),
        ("recall@0.8:music", None, {"film": "f1", "music": 0.8, "praise": "f1"}),
    ],
)
def test_the_tasks_metric_is_the_goal(metric, goal, expected):
    """Who asked for the recall of a rare label at a precision would get the other label's threshold, for F1."""
    kind, names = ("multi-label", NAMES) if "music" in expected else ("single-label", ("ham", "spam"))
    task = Task(kind, ("text",), ("label",), names, (metric,))
    assert settle_goals(task, goal) == expected
    with pytest.raises(DataError, match="names no label"):  # the experiment "ships no student", it was said
        settle_goals(task, {})
