"""Which runs a suite plans, and which of them it shares."""

from pathlib import Path

import pytest

from kdlora.experiment.plan import make_plan
from kdlora.experiment.settle import Chosen
from kdlora.experiment.suitefile import build_suite, load_suite

CONFIGS = Path(__file__).parents[2] / "configs"


SUITE = {
    "name": "s",
    "tasks": ["cola", "rte"],
    "families": {
        "one": {"teacher": {"model": "teacher"}, "student": {"model": "small"}},
        "two": {"teacher": {"model": "teacher"}, "student": {"model": "smaller"}},
    },
    "config": {"data": {"path": "x/y"}},
    "arms": ["fft", "lora", "kd-lora", "student-lora"],
    "grids": {
        "fft": {"teacher.train.learning_rate": [1e-5, 2e-5]},
        "adapters": {"lora.rank": [8, 16], "distil.alpha": [0.1, 0.5]},
    },
}


def plan(**changes):
    return make_plan(build_suite(SUITE | changes))


def arms(found, arm, task="cola"):
    return [run for run in found.runs() if (run.arm, run.task) == (arm, task)]


def test_nothing_is_made_twice():
    """A teacher that two families share, or a control for each alpha, would be trained over and over."""
    found = plan()
    assert len(arms(found, "fft")) == 2
    assert len(arms(found, "lora")) == 2
    assert len(arms(found, "student-lora")) == 2 * 2
    assert len(arms(found, "kd-lora")) == 2 * 2 * 2
    cells = found.cells_of("cola", "one"), found.cells_of("cola", "two")
    assert [run.key for run in cells[0]["fft"].runs] == [run.key for run in cells[1]["fft"].runs]
    assert not {run.key for run in cells[0]["kd-lora"].runs} & {run.key for run in cells[1]["kd-lora"].runs}


def test_a_distilled_arm_plans_its_teachers():
    """Without `fft` among the arms, its students would wait for a teacher that nobody trains."""
    found = plan(arms=["kd-lora"], seeds=[3, 4])
    assert [(run.seed) for run in arms(found, "fft")] == [3, 3]
    assert plan(arms=["student-lora"]).teachers == {}
    assert [len(group) for group in plan(teacher="first").teachers.values()] == [1, 1, 1, 1]


def test_teachers_come_before_their_students():
    """The order of the plan is the order of the serial engine."""
    order = [run.arm for run in plan(arms=["kd-lora", "fft"]).runs() if run.task == "cola"]
    assert order.index("fft") < order.index("kd-lora")


def test_a_folder_names_what_decides_the_figures():
    """A folder that stays the same when the recipe changes mixes old figures with new ones."""
    base = {run.key for run in plan().runs()}
    assert {run.key for run in plan(name="other", best=3).runs()} == base
    assert {run.key for run in plan(seeds=[0, 1]).runs()} > base
    longer = {"data": {"path": "x/y"}, "student": {"train": {"max_length": 64}}}
    changed = {run.key for run in plan(config=longer).runs()}
    assert {key for key in changed & base if "/fft-" not in key} == set()
    assert {key for key in changed if "/fft-" in key} == {key for key in base if "/fft-" in key}


def test_settings_that_an_arm_does_not_use_are_not_its_own():
    """A control labelled "alpha 0.1" claims a distillation that it never had."""
    assert {key for run in arms(plan(), "student-lora") for key, _ in run.settings} == {"lora.rank"}
    assert {key for run in arms(plan(), "kd-lora") for key, _ in run.settings} == {"lora.rank", "distil.alpha"}


def test_copies_belong_to_the_students_of_a_teacher_alone():
    """Recipes that differ in what the students read would train one teacher twice, and compare students of two."""
    train = {"train": {"epochs": 3, "learning_rate": 2e-5, "head_learning_rate": None}}
    families = {
        recipe: {"recipe": recipe, "teacher": {"model": "teacher"} | train, "student": {"model": "small"}}
        for recipe in ("default", "paper")
    }
    found = plan(families=families, grids={})
    assert {cell.runs[0].config.data.augment for cell in found.cells if cell.arm == "kd-lora"} == {4, 0}
    assert len(arms(found, "fft")) == 1
    assert [len(lesson.candidates) for lesson in found.lessons()] == [1] * 4
    assert len({lesson.candidates[0].key for lesson in found.lessons()}) == 2


@pytest.mark.parametrize(("name", "fft", "adapters"), [("paper", 25, 24), ("paper-small", 2, 3)])
def test_the_papers_suites(name, fft, adapters):
    """The protocol is 25 configurations of FFT and 24 of the others; a slip in a grid changes it silently."""
    suite = load_suite(CONFIGS / f"{name}.yaml")
    found = make_plan(suite)
    cell = found.cells_of(next(iter(suite.tasks)), next(iter(suite.families)))
    assert len({run.folder for run in cell["fft"].runs}) == fft
    for arm in ("lora", "kd-lora", "student-lora"):
        assert len({run.folder for run in cell[arm].runs}) == adapters
    if name == "paper":
        assert len(found.runs()) == 9 * 3 * (25 + 3 * 24)


def test_an_open_max_length_is_filled_in_for_all_arms_alike():
    """A control that reads less of a text than the distilled arm measures the cut."""
    suite = build_suite(SUITE | {"config": {"data": {"path": "x/y"}, "student": {"train": {"max_length": 96}}}})
    found = make_plan(
        suite, {("cola", "one"): Chosen(40, {"teacher": 1000, "student": 1000}, 2, {"teacher": 768, "student": 384})}
    )
    configs = {cell.arm: cell.runs[0].config for cell in found.cells if (cell.task, cell.family) == ("cola", "one")}
    assert configs["fft"].teacher.train.max_length == configs["kd-lora"].teacher.train.max_length == 40
    assert {configs[arm].student.train.max_length for arm in ("lora", "kd-lora", "student-lora")} == {96}
    assert {run.config.teacher.train.max_length for run in found.runs() if run.task != "cola"} == {None}
