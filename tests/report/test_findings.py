"""What the report finds: pairs of arms, shares, and which student ships."""

from dataclasses import replace

import numpy as np
import pytest

import fabricate
from fabricate import MNLI, TAGS, TOPICS, edit_record, make_experiment, make_labels, make_logits
from kdlora.evidence.predictions import Predictions
from kdlora.report.collect import load_experiment
from kdlora.report.findings import align, choose_student, compare_arms, read_choice
from kdlora.report.paper import family_of
from kdlora.report.report import make_report
from kdlora.system.storage import write_json_atomic


def _predictions(task, rows=8, seed=0) -> Predictions:
    labels = make_labels(task, rows)
    return Predictions(
        ids=tuple(str(row) for row in range(rows)),
        split=("validation",) * rows,
        logits=make_logits(task, labels, 0.5, seed),
        label_names=task.label_names,
        labels=labels,
    )


@pytest.mark.parametrize("task", [TOPICS, TAGS], ids=lambda task: task.kind)
def test_rows_and_columns_in_another_order_are_brought_into_line(task):
    """Pairing by position would compare the predictions of different texts, and of different labels."""
    first = _predictions(task)
    rows, columns = [3, 1, 0, 2, 7, 6, 5, 4], list(range(task.num_labels))[::-1]
    labels = first.labels[rows]
    other = Predictions(
        ids=tuple(first.ids[row] for row in rows),
        split=first.split,
        logits=first.logits[rows][:, columns],
        label_names=tuple(task.label_names[column] for column in columns),
        labels=labels[:, columns] if labels.ndim == 2 else np.array([columns.index(label) for label in labels]),
    )
    aligned = align([first, other])
    assert np.array_equal(aligned[1].logits, first.logits)
    assert np.array_equal(aligned[1].labels, first.labels)
    assert aligned[1].ids == first.ids
    assert aligned[1].label_names == first.label_names


def test_other_examples_labels_or_names_are_not_aligned():
    """The same ids with other labels are another data set."""
    first = _predictions(TOPICS)
    changed = first.labels.copy()
    changed[0] = (changed[0] + 1) % 4
    assert align([first, replace(first, labels=changed)]) is None
    assert align([first, replace(first, ids=(*first.ids[:-1], "other"))]) is None
    assert align([first, replace(first, ids=(*first.ids[:-1], "0"))]) is None
    assert align([first, replace(first, label_names=("a", "b", "c", "d"))]) is None
    assert align([replace(first, ids=("0",) * 8)]) is None
    assert align([first, replace(first, labels=None)]) is None
    assert align([first, replace(first, groups=("matched",) * 8)]) is None
    # MNLI's matched and mismatched rows both count from 0.
    one = replace(_predictions(MNLI), ids=tuple("01230123"), groups=("matched",) * 4 + ("mismatched",) * 4)
    aligned = align([one, one])
    assert np.array_equal(aligned[1].logits, one.logits)


def test_controls_are_compared_on_common_seeds_and_the_teacher_on_all_of_its_own(tmp_path):
    """A control with other seeds would differ by the seeds as well as by the teacher."""
    make_experiment(tmp_path / "e", failed=[("student-lora", 1), ("fft", 1), ("fft", 2)])
    experiment = load_experiment(tmp_path / "e")
    found = {one.second: one.difference for one in compare_arms(experiment, draws=100)}
    assert list(found) == ["student-lora", "lora", "fft"]
    assert found["student-lora"] is not None
    assert found["student-lora"].n_seeds == 2
    assert found["fft"] is not None
    assert found["fft"].n_seeds == 3


def test_the_papers_figures_belong_beside_the_papers_models():
    """Its costs beside another model would be believed."""
    assert family_of("google-bert/bert-base-uncased", "/models/distilbert-base-uncased/") == "bert"
    assert family_of("roberta-base", "distilbert-base-uncased") is None
    assert family_of(None, None) is None


STUDENTS = ("kd-lora", "kd-fft", "student-lora", "student-fft")


def choose(folder, **noise):
    """Fabricate an experiment whose arms are as noisy as told, and choose."""
    with pytest.MonkeyPatch.context() as patch:
        for arm, value in noise.items():
            patch.setitem(fabricate._NOISE, arm.replace("_", "-"), value)
        make_experiment(folder, arms=("fft", *(arm for arm in STUDENTS if arm.replace("-", "_") in noise)))
    experiment = load_experiment(folder)
    return choose_student(experiment.task, experiment.runs)


@pytest.mark.parametrize(
    ("noise", "shipped", "against"),
    [
        ({"kd_lora": 0.40, "student_lora": 0.70}, "kd-lora", "student-lora"),
        ({"kd_lora": 0.70, "student_lora": 0.40}, "student-lora", "kd-lora"),
        ({"kd_lora": 0.70, "student_lora": 0.45, "student_fft": 0.40}, "student-fft", "kd-lora"),
        ({"kd_lora": 0.52, "student_lora": 0.50}, "kd-lora", "student-lora"),  # within the interval of the best
        ({"kd_lora": 0.52, "kd_fft": 0.50}, "kd-lora", "kd-fft"),
        ({"kd_lora": 0.80, "kd_fft": 0.40, "student_fft": 0.60}, "kd-fft", "student-fft"),
        ({"student_fft": 0.5}, "student-fft", None),
    ],
)
def test_the_best_on_validation_ships_and_within_its_interval_the_distilled_one(tmp_path, noise, shipped, against):
    """An arm that always ships may be the worst by ten points."""
    found = choose(tmp_path / "e", **noise)
    assert (found.arm, found.against) == (shipped, against)
    experiment = load_experiment(tmp_path / "e")
    scores = {run.record.seed: run.record.score for run in experiment.finished(shipped)}
    assert found.seed == max(scores, key=lambda seed: scores[seed])
    assert set(found.scores) == {arm.replace("_", "-") for arm in noise}
    if max(found.scores, key=lambda arm: found.scores[arm]) != shipped:
        assert f"within the interval of the best, {'the distilled' if 'kd-fft' in found.scores else 'the'} student" in (
            found.sentence
        )


def test_validation_chooses_and_not_the_test_split(tmp_path):
    """A choice by the test split makes its score too high."""
    layout = make_experiment(tmp_path / "e", arms=("fft", "kd-lora", "student-lora"), test_split=True)
    for seed in range(3):
        edit_record(layout.run("student-lora", seed).record, test_score=99.0)
    experiment = load_experiment(layout.root)
    assert experiment.choice.arm == "kd-lora"


def test_a_score_that_is_not_defined_does_not_ship_before_one_that_is(tmp_path):
    """A constant student of a regression has no correlation; as NaN it would win or crash."""
    layout = make_experiment(tmp_path / "e", arms=("kd-lora", "student-lora"))
    for seed in range(3):
        edit_record(layout.run("kd-lora", seed).record, score=None)
    experiment = load_experiment(layout.root)
    found = choose_student(experiment.task, experiment.runs)
    assert (found.arm, found.scores["kd-lora"]) == ("student-lora", None)


def test_the_report_goes_by_what_was_shipped(tmp_path):
    """A report that chooses anew would speak of another student than the one in `student/`."""
    layout = make_experiment(tmp_path / "e", seeds=(0,))
    found = choose_student(load_experiment(layout.root).task, load_experiment(layout.root).runs)
    other = found.model_copy(update={"arm": "student-lora", "sentence": "The other student was shipped: it is."})
    write_json_atomic(layout.shipped, other.model_dump())
    assert read_choice(layout.shipped) == other
    report = make_report(layout.root, draws=50)
    assert report.markdown.split("\n\n")[1].startswith("**The other student was shipped**: it is. It keeps")
    layout.shipped.write_text("{")
    assert "The distilled student (kd-lora) was shipped" in make_report(layout.root, draws=50).markdown
