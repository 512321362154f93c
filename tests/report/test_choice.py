"""Which student ships, and that the record of it is what the report goes by."""

from __future__ import annotations

import pytest

import fabricate
from fabricate import make_experiment
from kdlora.evidence.records import read_record, write_record
from kdlora.report.collect import load_experiments
from kdlora.report.findings import choose_student, read_choice, write_choice
from kdlora.report.report import make_report

STUDENTS = ("kd-lora", "kd-fft", "student-lora", "student-fft")


def choose(folder, **noise):
    """Fabricate an experiment whose arms are as noisy as told, and choose."""
    with pytest.MonkeyPatch.context() as patch:
        for arm, value in noise.items():
            patch.setitem(fabricate._NOISE, arm.replace("_", "-"), value)
        make_experiment(folder, arms=("fft", *(arm for arm in STUDENTS if arm.replace("-", "_") in noise)))
    (experiment,) = load_experiments([folder])
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
    (experiment,) = load_experiments([tmp_path / "e"])
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
        place = layout.run("student-lora", seed).record
        write_record(place, read_record(place).model_copy(update={"test_score": 99.0}))
    (experiment,) = load_experiments([layout.root])
    assert experiment.choice.arm == "kd-lora"


def test_a_score_that_is_not_defined_does_not_ship_before_one_that_is(tmp_path):
    """A constant student of a regression has no correlation; as NaN it would win or crash."""
    layout = make_experiment(tmp_path / "e", arms=("kd-lora", "student-lora"))
    for seed in range(3):
        place = layout.run("kd-lora", seed).record
        write_record(place, read_record(place).model_copy(update={"score": None}))
    (experiment,) = load_experiments([layout.root])
    found = choose_student(experiment.task, experiment.runs)
    assert (found.arm, found.scores["kd-lora"]) == ("student-lora", None)


def test_the_report_goes_by_what_was_shipped(tmp_path):
    """A report that chooses anew would speak of another student than the one in `student/`."""
    layout = make_experiment(tmp_path / "e", seeds=(0,))
    found = choose_student(load_experiments([layout.root])[0].task, load_experiments([layout.root])[0].runs)
    other = found.model_copy(update={"arm": "student-lora", "sentence": "The other student was shipped: it is."})
    write_choice(layout.shipped, other)
    assert read_choice(layout.shipped) == other
    report = make_report([layout.root], draws=50)
    assert report.markdown.split("\n\n")[1].startswith("**The other student was shipped**: it is. It keeps")
    layout.shipped.write_text("{")
    assert "The distilled student (kd-lora) was shipped" in make_report([layout.root], draws=50).markdown
