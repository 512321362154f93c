"""`kdlora defer`, what its promise does to a model's answers, and the cascade on top of it."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from safetensors.numpy import load_file, save_file

import tiny
from experiments import copy_experiment, edit_json, numbered, read_rows, snapshot
from kdlora.configfile import load_config, save_config
from kdlora.deploy.cascade import Cascade
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.folder import Way, read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.deploy.runtimes import store_speeds
from kdlora.errors import ArtifactError, ConfigError, DataError, ModelError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment import deployment, recording
from kdlora.experiment.deferral import decide_student, defer_experiment, is_decided
from kdlora.experiment.deployment import benchmark_cascade, export_model, is_deployed, load_without_copies, unseen_rows
from kdlora.experiment.fitting import fit_thresholds
from kdlora.experiment.run import run_experiment
from kdlora.experiment.settle import with_values
from kdlora.report.report import make_report
from kdlora.report.shipped import BenchmarkResult
from kdlora.system.storage import hold_lock


def sureness(said) -> np.ndarray:
    """Give the probability of each answer."""
    return np.array([max(one.probabilities.values()) for one in said])


@pytest.fixture(scope="module")
def finished(workshop, made_once) -> Path:
    """An experiment with a test split and both exports, and beside it one with its promise; read only.

    Its validation and test rows get labels anew: the student is right where it is sure, and wrong in half of the rest.
    """

    def make(folder: Path) -> Path:
        rows = {"train": numbered(64, 1), "validation": numbered(200, 2), "test": numbered(600, 3)}
        changes = {
            "data": {name: str(tiny.write_csv(folder / f"{name}.csv", table)) for name, table in rows.items()},
            "run": {"arms": ["fft", "kd-lora", "student-lora"], "seeds": [0]},
            "export": {"formats": ["onnx", "onnx-int8"], "benchmark": False, "min_agreement": 0.0},
        }
        root = run_experiment(workshop.config(changes), folder / "experiment").layout.root
        student = Classifier.load(root / "student")
        for name in ("validation", "test"):
            said = student.predict([row["text"] for row in rows[name]])
            unsure = np.argsort(sureness(said))[: len(said) // 2]
            for place, row in enumerate(rows[name]):
                row["label"] = said[place].label
            for place in unsure[::2]:
                rows[name][place]["label"] = min(said[place].probabilities, key=said[place].probabilities.get)
            tiny.write_csv(folder / f"{name}.csv", rows[name])
        found = defer_experiment(copy_experiment(root, folder / "promised"), error=0.1)
        names = ["student", "student, ONNX", "student, int8", "fft", "student-lora", "kd-lora"]
        assert [model.name for model in found.models] == names
        make_report(folder / "promised")
        return root

    return made_once("deferral", make)


@pytest.fixture
def promised(finished: Path, tmp_path: Path) -> Path:
    """A copy of the one with its promise, free to be changed."""
    return copy_experiment(finished.parent / "promised", tmp_path / "experiment")


@pytest.fixture
def by_sureness(promised: Path) -> list[str]:
    """Texts, the one first that the student is least sure of."""
    texts = [row["text"] for row in numbered(90, 5)]
    said = Classifier.load(promised / "student", decisions="thresholds").predict(texts)
    return [texts[place] for place in np.argsort(sureness(said))]


def test_a_model_is_silent_where_it_is_not_sure(promised: Path, by_sureness, tmp_path: Path, cli) -> None:
    """A promise that the answers do not keep to is worse than none."""
    unsure, sure = by_sureness[0], by_sureness[-1]
    for place in (promised / "student", promised / "student-onnx"):
        first, second = Classifier.load(place).predict([sure, unsure])
        assert first.label == max(first.probabilities, key=first.probabilities.get)
        assert first.deferred == ""
        assert second.label is None
        assert "is below" in second.deferred
        assert set(second.probabilities) == {"negative", "positive"}
        assert Classifier.load(place, decisions="thresholds").predict([unsure])[0].label is not None
        with pytest.raises(ModelError, match=r"promised for a max_length of \d+, got 8. Load the model with the"):
            Classifier.load(place, max_length=8)  # its answers are others
        assert Classifier.load(place, max_length=8, decisions="thresholds").predict([unsure])[0].label is not None
    changed = shutil.copytree(promised / "student-onnx", tmp_path / "changed") / "kdlora_decisions.json"
    changed.write_text(re.sub(r'"threshold": [^,]*', '"threshold": 0.99', changed.read_text()))
    with pytest.raises(ArtifactError, match=r"decisions\.json is damaged: it is not what was written"):
        Classifier.load(changed.parent)
    texts = tiny.write_csv(tmp_path / "texts.csv", [{"id": "a", "text": sure}, {"id": "b", "text": unsure}])
    cli("predict", promised / "student-onnx", texts, "--to", tmp_path / "said.csv")
    assert [(row["label"], row["error"]) for row in read_rows(tmp_path / "said.csv")] == [(first.label, ""), ("", "")]
    lines = cli("predict", promised / "student-onnx", texts).out.splitlines()
    assert "is below" in json.loads(lines[1])["deferred"]


def test_rows_that_promise_nothing_are_refused(finished: Path, tmp_path: Path, cli) -> None:
    """On rows that the model was chosen by, its errors are too few, and the promise is broken in use.

    Rows that were added since move the drawn splits, and a threshold is fitted on what the student learnt.
    """
    folder = copy_experiment(finished, tmp_path / "experiment")
    assert "all 64 texts" in cli("defer", folder, "--data", finished.parent / "train.csv", code=2).err
    splits = load_without_copies(load_config(folder / "config.yaml"), ExperimentLayout(folder))
    with pytest.raises(DataError, match="are training, validation or unlabelled texts, too"):
        unseen_rows(replace(splits, unlabelled=splits.test), splits.test, "later.csv")
    long, new = "word " * 9_000, "a new one"  # a labelled collection has only the beginning of a long text
    cut, later = (Dataset.from_dict({"id": list("ab"), "text": texts}) for texts in ([long[:20_000], "x"], [long, new]))
    assert unseen_rows(replace(splits, unlabelled=cut), later, "later.csv")[0]["text"][:] == [new]
    config, validation = folder / "config.yaml", str(finished.parent / "validation.csv")
    given = config.read_text()
    config.write_text("".join(line for line in given.splitlines(True) if "test.csv" not in line))
    assert "no test split" in cli("defer", folder, code=2).err
    new = {"id": "new", "text": "a new one", "label": "positive"}
    other = tiny.write_csv(tmp_path / "validation.csv", [*read_rows(validation)[1:], new])
    config.write_text(given.replace(validation, str(other)))
    for verb in ("thresholds", "defer"):
        assert "the validation rows are others than when it ran" in cli(verb, folder, code=2).err
    for split in ("train", "validation", "test"):  # thresholds were fitted for one label on the rows of the other
        lines = (finished.parent / f"{split}.csv").read_text().replace("positive", "good")
        (tmp_path / f"{split}.csv").write_text(lines)
    config.write_text(given.replace(str(finished.parent), str(tmp_path)))
    for verb in ("thresholds", "defer"):
        told = "the labels are others than when it ran, when they were negative, positive"
        assert told in cli(verb, folder, code=2).err.replace("'", "")
    assert not (folder / "defer.json").exists()


def test_what_was_decided_by_hand_goes_neither_unasked_nor_without_a_word(promised: Path) -> None:
    """After `kdlora benchmark`, the next run threw away the export, its thresholds and its promise.

    A config with thresholds decides anew, and the promise that was made by hand was gone.
    """
    layout = ExperimentLayout(promised)
    config = load_config(layout.config)
    store_speeds({Way(layout.onnx, precision="int8"): {1: 100.0}})
    assert is_deployed(config, layout)
    for place in (layout.onnx / "LICENSE", layout.onnx / "service.py", layout.student / ".DS_Store"):
        place.write_text("put there by hand")
        assert is_deployed(config, layout)
    with pytest.raises(ArtifactError, match=r"is no file of a model, and would be lost where \S*student-onnx is made"):
        deployment.deploy_student(with_values(config, {"export.max_metric_drop": 0.9}), layout, print)
    assert layout.onnx.exists()
    config = with_values(config, {"export.thresholds": "f1"})
    recording.refuse_loss(layout.student)  # what a file manager leaves there stops nothing
    layout.decided.write_text("earlier")
    with hold_lock(layout.lock, "runs it"):  # as a run does
        assert "What kdlora defer had decided is gone" in "".join(decide_student(config, layout))
    (layout.student / "NOTICE").write_text("put there by hand")
    assert is_decided(config, layout)
    assert layout.thresholds.exists()
    assert not layout.deferral.exists()


def test_what_is_only_measured_later_stays_as_it_is(promised: Path, monkeypatch) -> None:
    """To turn `export.benchmark` on exported the student again, and took the promise that was made by hand.

    An export in the place of the experiment's own left figures, promise and thresholds of files that were gone.
    """
    layout = ExperimentLayout(promised)
    config = with_values(load_config(layout.config), {"export.benchmark": True})
    before = [snapshot(place) for place in (layout.student, layout.onnx)]
    with pytest.raises(ConfigError, match="is what `kdlora run` exports"):
        export_model(layout.student, layout.onnx, formats="onnx")
    monkeypatch.setattr(deployment, "benchmark", lambda *_, **__: BenchmarkResult(rounds=7))
    assert deployment.deploy_student(config, layout, print) == ()
    assert [snapshot(place) for place in (layout.student, layout.onnx)] == before
    assert layout.deferral.exists()
    assert json.loads(layout.benchmark.read_text())["rounds"] == 7
    assert is_deployed(config, layout)
    assert deployment.deploy_student(with_values(config, {"export.benchmark": False}), layout, print) == ()
    assert [snapshot(place) for place in (layout.student, layout.onnx)] == before
    assert layout.deferral.exists()


def test_a_new_export_says_that_it_promises_nothing(promised: Path, tmp_path: Path, caplog, monkeypatch) -> None:
    """An answer was given where the experiment's own file, of the same weights, gives none.

    Every stage read all of 200,000 validation rows on the CPU, after a training of an hour on a GPU.
    """
    monkeypatch.setattr(deployment, "CHECKED_ROWS", 12)
    result = export_model(promised, tmp_path / "out", formats="onnx")
    assert {one.labelled for one in result.stages} == {12}
    told = "thresholds and the promised error rate are of other files than those of"
    assert [one for one in caplog.messages if f"kdlora_decisions.json: {told} {tmp_path / 'out'}" in one]
    # A tokenizer's limit below the config's: the export read on, where the student had learnt nothing, and passed.
    settings = json.loads((promised / "student" / "config.json").read_text())
    (promised / "student" / "config.json").write_text(json.dumps(settings | {"kdlora_max_length": 9}))
    export_model(promised, tmp_path / "short", formats="onnx")
    assert Classifier.load(tmp_path / "short").folder.max_length == 9


def test_what_cannot_be_promised_is_said_and_leaves_every_answer(promised: Path, by_sureness, cli, caplog) -> None:
    """A threshold of an earlier, larger error rate would stay in force."""
    assert Classifier.load(promised / "student").predict(by_sureness[:1])[0].label is None
    found = json.loads((promised / "defer.json").read_text())
    found["models"][2] |= {"promise": None, "reason": "no rows"}
    (promised / "defer.json").write_text(json.dumps(found))
    told = "Of what ships: student, int8 nothing can be promised, so every text is answered."
    assert told in make_report(promised).markdown
    refused = cli("defer", promised, "--error", "0.0001", code=2)  # what is in use is not switched off by a try
    assert "What was promised before stays" in refused.err
    assert told in make_report(promised).markdown
    assert Classifier.load(promised / "student").predict(by_sureness[:1])[0].label is None
    (promised / "defer.json").unlink()
    refused = cli("defer", promised, "--error", "0.0001", code=2)
    assert "\nNothing can be promised, so every text is answered." in (promised / "report.md").read_text()
    assert "cannot be promised with 95% confidence on 600 rows" in refused.err
    assert ", asked for: at most " in (promised / "report.md").read_text()
    assert "Nothing is promised, so every text is answered." in refused.err
    assert Classifier.load(promised / "student").predict(by_sureness[:1])[0].label is not None
    assert "above 0 and below 1, got 5" in cli("defer", promised, "--error", "5", code=2).err
    for wrong in ({"sureness": "entropy"}, {"error": "0.05"}):
        with pytest.raises(DataError, match=r"one of probability, margin, energy|must be above 0"):
            defer_experiment(promised, **wrong)
    rows = [{"text": text, "label": "positive"} for text in by_sureness[:9] * 2]
    cli("defer", promised, "--data", tiny.write_csv(promised / "twice.csv", rows), code=2)
    assert "9 of 18 rows repeat a text: a promise is of independent rows" in caplog.messages
    assert not any("is gone" in note for note in fit_thresholds(promised, "f1").notes)  # for nothing was promised


def test_a_cascade_hands_on_what_the_student_is_not_sure_of(promised: Path, by_sureness) -> None:
    """An answer that lands at another text, or a teacher whose labels stand in another order, would pass unseen."""
    texts = by_sureness[::2] + by_sureness[1::2]
    cascade = Cascade.load(promised / "student-onnx" / "model.onnx", promised / "teacher")
    answers = cascade.predict(pd.Series(texts, index=range(len(texts))[::-1]))  # as of a shuffled table
    student = Classifier.load(promised / "student-onnx", precision="fp32", decisions="thresholds").predict(texts)
    teacher = Classifier.load(promised / "teacher").predict(texts)
    assert {answer.by for answer in answers} == {"student", "teacher"}
    for answer, small, large in zip(answers, student, teacher, strict=True):
        assert answer.label == (small if answer.by == "student" else large).label
        assert (answer.sureness >= cascade.threshold) == (answer.by == "student")
    assert cascade.predict([]) == []


def test_a_service_may_be_the_teacher(promised: Path) -> None:
    """A service that loses a text, or invents a label, must not shift or spoil the answers after it."""
    asked: list[str] = []

    def service(texts) -> list[str]:
        asked.extend(texts)
        return ["negative"] * len(texts)

    answers = Cascade.load(promised / "student", service, 2.0).predict(["a wonderful film", "a dull one"])
    assert [answer.label for answer in answers] == ["negative", "negative"]
    assert asked == ["a wonderful film", "a dull one"]
    Cascade.load(promised / "student", service, 2.0).predict("a film")
    assert asked[2:] == ["a film"], "not its first letter"
    with pytest.raises(DataError, match=r"a label for each of 1 texts from the teacher, got \[\]"):
        Cascade.load(promised / "student", lambda texts: [], 2.0).predict(["a film"])
    with pytest.raises(DataError, match="gave 'good'; the labels are negative, positive"):
        Cascade.load(promised / "student", lambda texts: ["good"], 2.0).predict(["a film"])
    with pytest.raises(DataError, match="must be a number"):
        Cascade.load(promised / "student", service, float("nan"))
    with pytest.raises(ModelError, match="promises no error rate"):
        Cascade.load(promised / "teacher", service)
    of_pairs = Classifier.load(promised / "teacher")
    of_pairs.folder = replace(of_pairs.folder, texts=2)
    with pytest.raises(ModelError, match="one reads 1 text a row, the other 2"):
        Cascade.load(promised / "student", of_pairs, 0.9)


def test_a_cascade_is_scored_by_the_answers_that_it_gives(promised: Path, finished: Path) -> None:
    """With fitted thresholds it gave other answers than those that the curve's score was of."""
    student, rows = promised / "student", read_rows(finished.parent / "test.csv")
    said = Classifier.load(student).predict([row["text"] for row in rows])
    middle = np.median([one.probabilities["positive"] for one in said])
    write_decisions(read_model_folder(student), Decisions(thresholds={"positive": float(middle)}))
    curve = benchmark_cascade([student, promised / "teacher"], data=str(finished.parent / "test.csv"))
    for point in curve.points[:: len(curve.points) // 3]:
        answers = Cascade.load(student, promised / "teacher", point.threshold).predict([row["text"] for row in rows])
        right = [one.label == row["label"] for one, row in zip(answers, rows, strict=True)]
        assert point.score == pytest.approx(100 * np.mean(right))

    # A student of other software, whose labels stand in another order than the task's.
    edit_json(student / "config.json", id2label={"0": "positive", "1": "negative"}, label2id={}, kdlora_task=None)
    weights = load_file(student / "model.safetensors")
    turned = {name: tensor[::-1].copy() if tensor.shape[:1] == (2,) else tensor for name, tensor in weights.items()}
    save_file(turned, student / "model.safetensors", {"format": "pt"})
    (student / "kdlora_decisions.json").unlink()
    write_decisions(read_model_folder(student), Decisions())
    again = benchmark_cascade([student, promised / "teacher"], data=str(finished.parent / "test.csv"))
    alone = benchmark_cascade([finished / "student", promised / "teacher"], data=str(finished.parent / "test.csv"))
    assert again.points[0].score == pytest.approx(alone.points[0].score)


def test_the_command_line_draws_both(promised: Path, finished: Path, cli) -> None:
    """A verb that fails on its own output, or a report without its section, would leave the promise unseen."""
    told = json.loads((promised / "defer.json").read_text())
    assert json.loads(cli("defer", promised, "--error", "0.1", "--json").out) == told
    assert "What may be acted on" in (promised / "report.md").read_text()
    page = (promised / "report.html").read_text()
    assert "Error against coverage" in page
    models = promised / "student-onnx", promised / "teacher"
    shown = cli("benchmark", *models, "--data", finished.parent / "test.csv", "--cascade", "--json")
    assert json.loads(shown.out, parse_constant=pytest.fail)["points"][-1]["handed_on"] == 1
    drawn = cli("benchmark", *models, "--data", finished.parent / "test.csv", "--cascade", "--plot", promised / "c.svg")
    assert "within 0.2 points of the teacher" in drawn.out
    words = re.findall(r">([^<]+)</text>", (promised / "c.svg").read_text())
    assert {"student alone", "teacher alone", "score"} <= set(words)
    assert "two models" in cli("benchmark", models[0], "--cascade", code=2).err
    refused = cli("benchmark", *models, "--cascade", "--plot", promised / "c.csv", code=2)
    assert "c.csv: a plot is drawn as one of png, svg" in refused.err


def test_texts_of_no_known_class_are_met_by_every_model(promised: Path, finished: Path, tmp_path: Path, cli) -> None:
    """A threshold that holds on known classes may let everything strange through, and nobody would see it."""
    (tmp_path / "strange.txt").write_text("".join(f"qwx zzv {n}\n" for n in range(30)))
    done = cli("defer", promised, "--error", "0.1", "--unknown", tmp_path / "strange.txt")
    assert "30 texts of no known class" in done.out
    assert "600 rows of the test split, at most 10.0% wrong with 95% confidence" in " ".join(done.out.split())
    found = json.loads((promised / "defer.json").read_text())
    met = {model["name"]: model["unknown"] for model in found["models"] if model["unknown"]}
    assert set(met) == {"student", "student, ONNX", "student, int8", "fft"}
    texts = [f"qwx zzv {n}" for n in range(30)]
    answers = Classifier.load(promised / "student").predict(texts)
    by_kind = {one["sureness"]: one for one in met["student"]}
    assert set(by_kind) == {"probability", "margin", "energy"}
    assert by_kind["probability"]["deferred"] == pytest.approx(np.mean([one.label is None for one in answers]))
    known = [row["text"] for row in numbered(600, 3)]
    sure, strange = sureness(Classifier.load(promised / "student").predict(known)), sureness(answers)
    pairs = (sure[:, None] > strange).mean() + (sure[:, None] == strange).mean() / 2
    assert by_kind["probability"]["told_apart"] == pytest.approx(pairs, abs=1e-3)
    assert "Texts of no known class" in (promised / "report.md").read_text()
    # A given teacher has no weights here, though its answers are kept: half of the decisions were written.
    config = load_config(promised / "config.yaml")
    given = with_values(config, {"teacher.fine_tuned": str(finished.parent / "experiment" / "teacher")})
    (promised / "config.yaml").write_text(save_config(given))
    for weights in (promised / "teacher").glob("*.*"):
        weights.unlink()
    cli("defer", promised, "--error", "0.1", "--unknown", tmp_path / "strange.txt")
    cli("defer", promised, "--unknown", tmp_path / "absent.txt", code=2)


def test_a_promise_is_of_the_answers_by_thresholds(promised: Path, finished: Path, by_sureness, cli) -> None:
    """Thresholds change answers, so a promise of the old ones would be kept to, and be false."""
    fitted = cli("thresholds", promised, "--metric", "f1", "--positive", "negative")
    assert "of other answers and is gone" in " ".join(fitted.out.split())
    assert not (promised / "defer.json").exists()
    model = Classifier.load(promised / "student-onnx")
    assert model.decisions.promise is None
    assert set(model.decisions.thresholds) == {"negative"}
    for answer in model.predict(by_sureness):
        likely = answer.probabilities["negative"] > model.decisions.thresholds["negative"]
        assert answer.label == ("negative" if likely else "positive")
    cli("defer", promised, "--error", "0.2")
    assert "is gone" not in (promised / "report.md").read_text()  # though the promise stands just below
    again = Classifier.load(promised / "student-onnx")
    assert again.decisions.thresholds == model.decisions.thresholds
    rows = numbered(600, 3)
    answers = again.predict([row["text"] for row in rows])
    labels = [row["label"] for row in read_rows(finished.parent / "test.csv")]
    given = [(one.label, label) for one, label in zip(answers, labels, strict=True) if one.label is not None]
    promise = again.decisions.promise
    assert (len(given), sum(said != label for said, label in given)) == (promise.answered, promise.wrong)
    assert promise.wrong < 0.2 * promise.answered


DECIDE = pytest.mark.parametrize("decide", [fit_thresholds, lambda folder: defer_experiment(folder, error=0.1)])


@DECIDE
def test_nothing_is_decided_while_a_run_is_at_work(promised, decide):
    """A run that ships another student meanwhile gave the promise of the old one the hash of the new one."""
    layout, before = ExperimentLayout(promised), snapshot(promised)
    with hold_lock(layout.lock, "runs it"), pytest.raises(ArtifactError, match="another process works on the exp"):
        decide(promised)
    assert snapshot(promised) == before


@DECIDE
@pytest.mark.parametrize("name", ["student", "student/README.md"])
def test_nothing_is_decided_through_a_link(promised, tmp_path, decide, name):
    """An experiment of somebody else may hold `student/README.md -> ../../.bashrc`, which became the model's card."""
    theirs = tmp_path / "theirs"
    (promised / name).rename(theirs)
    (promised / name).symlink_to(theirs)
    before = snapshot(theirs) if theirs.is_dir() else theirs.read_text()
    with pytest.raises(ArtifactError, match=f"{name} is a link"):
        decide(promised)
    assert before == (snapshot(theirs) if theirs.is_dir() else theirs.read_text())
