"""What a suite file may say, which runs it plans and shares, and how long they will take."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from fabricate import BINARY
from kdlora.data.tasks import GLUE
from kdlora.errors import ConfigError
from kdlora.experiment.plan import make_plan
from kdlora.experiment.preview import ADAPTERS, FULL, RUN_SECONDS
from kdlora.experiment.recording import TaskFacts
from kdlora.experiment.settle import Chosen, ModelLook, settings_for
from kdlora.experiment.suite import estimate
from kdlora.experiment.suitefile import build_suite, configurations, load_suite, save_suite
from kdlora.section import DataConfig

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
CHOSEN = Chosen(40, {"teacher": 1000, "student": 1000}, BINARY, {"teacher": 768, "student": 384})


def suite(**changes):
    return build_suite(SUITE | changes)


def plan(**changes):
    return make_plan(suite(**changes))


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

    # Without `fft` among the arms, its students would wait for a teacher that nobody trains.
    found = plan(arms=["kd-lora"], seeds=[3, 4])
    assert [(run.seed) for run in arms(found, "fft")] == [3, 3]
    assert plan(arms=["student-lora"]).teachers == {}
    assert [len(group) for group in plan(teacher="first").teachers.values()] == [1, 1, 1, 1]


def test_a_folder_names_what_decides_the_figures():
    """A folder that stays the same when the recipe changes mixes old figures with new ones."""
    base = {run.key for run in plan().runs()}
    assert {run.key for run in plan(name="other", best=3).runs()} == base
    assert {run.key for run in plan(seeds=[0, 1]).runs()} > base
    longer = {"data": {"path": "x/y"}, "student": {"train": {"max_length": 64}}}
    changed = {run.key for run in plan(config=longer).runs()}
    assert {key for key in changed & base if "/fft-" not in key} == set()
    assert {key for key in changed if "/fft-" in key} == {key for key in base if "/fft-" in key}

    # A control labelled "alpha 0.1" claims a distillation that it never had.
    assert {key for run in arms(plan(), "student-lora") for key, _ in run.settings} == {"lora.rank"}
    assert {key for run in arms(plan(), "kd-lora") for key, _ in run.settings} == {"lora.rank", "distil.alpha"}


def test_copies_belong_to_the_students_of_a_teacher_alone():
    """Recipes that differ in what the students read would train one teacher twice, and compare students of two."""
    train = {"train": {"epochs": 3, "learning_rate": 2e-5, "head_learning_rate": None, "select": "last"}}
    families = {
        recipe: {"recipe": recipe, "teacher": {"model": "teacher"} | train, "student": {"model": "small"}}
        for recipe in ("default", "paper")
    }
    found = plan(families=families, grids={})
    assert {cell.runs[0].config.data.augment for cell in found.cells if cell.arm == "kd-lora"} == {4, 0}
    assert len(arms(found, "fft")) == 1
    assert [len(lesson.candidates) for lesson in found.lessons()] == [1] * 4
    assert len({lesson.candidates[0].key for lesson in found.lessons()}) == 2
    families = {f"copied-{count}": families["paper"] | {"data": {"augment": count}} for count in (0, 1)}
    found = plan(families=families, grids={})
    assert [len(arms(found, arm)) for arm in ("fft", "kd-lora", "student-lora")] == [1, 2, 1]


def test_an_arm_keeps_what_it_reads_of_another_section_and_nothing_else():
    """The head of a control at another rate than that of `kd-fft`; teachers by adapters, alike but for the students."""
    head = {"data": {"path": "x/y"}, "teacher": {"train": {"head_learning_rate": 2e-3}}}
    found = plan(config=head, arms=["kd-fft", "student-fft"], grids={})
    rates = {settings_for(run.config, run.arm).head_learning_rate for run in found.runs() if run.arm != "fft"}
    assert rates == {2e-3}
    lora = {"data": {"path": "x/y"}, "teacher": {"tuning": "lora", "adapter_learning_rate": 1e-3}}
    grid = {"adapters": {"student.train.learning_rate": [1e-3, 2e-3]}}
    found = plan(config=lora, arms=["lora", "kd-lora"], grids=grid, families={"one": SUITE["families"]["one"]})
    assert (len(arms(found, "lora")), len(arms(found, "kd-lora"))) == (1, 2)


def test_a_rate_of_adapters_is_none_of_a_tuned_teacher():
    """Families of two student rates would train the same teacher twice: hours, for two equal models."""
    data, student = {"data": {"path": "x/y"}, "teacher": {"model": "teacher"}}, {"model": "small"}
    families = {"open": {"student": student}, "set": {"student": student | {"train": {"learning_rate": 1e-4}}}}
    both = suite(families=families, grids={}, config=data)
    found = make_plan(both, {(task, family): CHOSEN for task in both.tasks for family in families})
    for task in both.tasks:
        assert len({run.folder for run in found.runs() if (run.task, run.arm) == (task, "fft")}) == 1
        assert len({run.folder for run in found.runs() if (run.task, run.arm) == (task, "lora")}) == 2


@pytest.mark.parametrize(("name", "fft", "adapters"), [("paper", 25, 24), ("paper-small", 2, 3)])
def test_the_papers_suites(name, fft, adapters):
    """The protocol is 25 configurations of FFT and 24 of the others; a slip in a grid changes it silently."""
    papers = load_suite(CONFIGS / f"{name}.yaml")
    found = make_plan(papers)
    cell = found.cells_of(next(iter(papers.tasks)), next(iter(papers.families)))
    assert len({run.folder for run in cell["fft"].runs}) == fft
    for arm in ("lora", "kd-lora", "student-lora"):
        assert len({run.folder for run in cell[arm].runs}) == adapters
    if name == "paper":
        assert len(found.runs()) == 9 * 3 * (25 + 3 * 24)


def test_an_open_max_length_is_filled_in_for_all_arms_alike():
    """A control that reads less of a text than the distilled arm measures the cut."""
    cut = suite(config={"data": {"path": "x/y"}, "student": {"train": {"max_length": 96}}})
    found = make_plan(cut, {("cola", "one"): CHOSEN})
    configs = {cell.arm: cell.runs[0].config for cell in found.cells if (cell.task, cell.family) == ("cola", "one")}
    assert configs["fft"].teacher.train.max_length == configs["kd-lora"].teacher.train.max_length == 40
    assert {configs[arm].student.train.max_length for arm in ("lora", "kd-lora", "student-lora")} == {96}
    assert {run.config.teacher.train.max_length for run in found.runs() if run.task != "cola"} == {None}


FACTS = {
    name: TaskFacts(GLUE[name].task.to_dict(), {}, {DataConfig(path="x/y").row_settings: {"train": rows}}, ())
    for name, rows in (("cola", 1000), ("rte", 500))
}
LENGTHS = np.array([4, 6])  # five tokens a text
LOOKS = {"teacher": ModelLook(LENGTHS, 128, 768, seconds=1e-4), "student": ModelLook(LENGTHS, 128, 384, seconds=1e-5)}
TWO, FOUR = ({"epochs": epochs, "learning_rate": 1e-3, "max_length": 128} for epochs in (2, 4))


def test_the_estimate_leaves_out_what_has_finished():
    """A suite that is nearly done would be put off for the hours that it has behind it."""
    config = {"data": {"path": "x/y"}, "teacher": {"train": TWO}, "student": {"train": FOUR}}
    own = plan(families={"own": SUITE["families"]["one"]}, config=config, arms=["fft", "student-lora"], grids={})
    looks = {(task, "own"): LOOKS for task in SUITE["tasks"]}
    of_cola = 1000 * 5.0 * (2 * FULL * 1e-4 + 4 * ADAPTERS * 1e-5)
    # RTE has half the rows, texts of the same length.
    assert estimate(own, {}, FACTS, looks) == pytest.approx(of_cola * 1.5 + 4 * RUN_SECONDS)
    done = {run.key: SimpleNamespace() for run in own.runs() if run.task == "rte"}
    assert estimate(own, done, FACTS, looks) == pytest.approx(of_cola + 2 * RUN_SECONDS)


def test_names_stand_for_sections():
    """The benchmark's own spelling of a task must not become a second task."""
    found = suite(tasks=["cola", "SST-2"], families=["bert", "roberta"])
    assert found.tasks == {"cola": {"task": {"name": "cola"}}, "sst2": {"task": {"name": "sst2"}}}
    assert found.families["roberta"] == {"family": "roberta"}

    # One teacher for every task of a suite would be the teacher of the wrong labels.
    with pytest.raises(ConfigError, match="a suite trains its teachers"):
        plan(families=["bert"], config={"data": {"path": "x/y"}, "teacher": {"fine_tuned": "somewhere"}})

    # Among thousands of configurations, "rank: greater than 0" alone helps nobody.
    with pytest.raises(ConfigError, match=r"(?s)s: cola, one, lora.*lora\.rank"):
        plan(grids={"adapters": {"lora.rank": [8, 0]}})
    with pytest.raises(ConfigError, match=r"lora\.rnak: unknown key. Did you mean 'rank'"):
        plan(grids={"adapters": {"lora.rnak": [8]}})
    # A family's teacher would take the place of what the suite says of all teachers.
    with pytest.raises(ConfigError, match="s: cola, one: teacher: expected keys such as 'model:', got 5"):
        plan(config={"data": {"path": "x/y"}, "teacher": 5})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["cloa"]}, "unknown task 'cloa'.*Did you mean 'cola'"),
        ({"tasks": ["ax"]}, "ax.*no training data"),
        ({"families": ["rberta"]}, "unknown family 'rberta'.*Did you mean 'roberta'"),
        ({"arms": ["kdlora"]}, "arms.0: input should be 'words', .*, got 'kdlora'. Did you mean 'kd-lora'"),
        ({"tasks": ["sst2", "SST-2"]}, "'sst2' stands twice, so two runs would share one folder"),
        ({"families": {"a/b": {}}}, "cannot name a folder"),
        ({"seeds": [1, 1]}, "seeds holds a value twice, so two runs would share one folder"),
        ({"grids": {"adapters": {"lora.rank": [8, 8]}}}, "stands twice, so two runs would share one folder"),
        ({"grids": {"adapters": {"lora.rank": []}}}, "an axis has no values"),
        ({"grids": {"adapters": {"lora.rank": 8}}}, "expected a list of values, got 8"),
        ({"config": {"data": {"path": "x"}, "run": {"seeds": [1]}}}, "set `seeds` at the top level"),
        ({"config": {"data": {"path": "x"}, "run": "arms"}}, "config.run: expected keys such as .*, got 'arms'"),
    ],
)
def test_faults_are_told(changes, expected):
    """A slip that passes costs a week of wrong runs."""
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        suite(**changes)


def test_axes_multiply_and_joint_settings_stay_together():
    """A grid that is read otherwise than it was written runs other configurations than the table claims."""
    grid = [{"lora.rank": [8, 16]}, [{"lora.alpha": 16, "lora.dropout": 0.0}, {"lora.alpha": 32, "lora.dropout": 0.1}]]
    found = list(configurations(suite(grids={"adapters": grid}).grids.adapters))
    assert found == [
        {"lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.0},
        {"lora.rank": 8, "lora.alpha": 32, "lora.dropout": 0.1},
        {"lora.rank": 16, "lora.alpha": 16, "lora.dropout": 0.0},
        {"lora.rank": 16, "lora.alpha": 32, "lora.dropout": 0.1},
    ]
    assert list(configurations(())) == [{}]


def test_paths_resolve_where_they_were_written(tmp_path, monkeypatch):
    """A saved suite that is carried out from another folder must read the same data."""
    (tmp_path / "suites").mkdir()
    (tmp_path / "glue").mkdir()
    file = tmp_path / "suites" / "s.yaml"
    file.write_text(yaml.safe_dump(SUITE | {"config": {"data": {"path": "../glue"}}}), encoding="utf-8")
    loaded = load_suite(file)
    assert loaded.config["data"]["path"] == str(tmp_path / "glue")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_suite(file, ["config.data.path=./other"]).config["data"]["path"] == str(tmp_path / "other")
    again = build_suite(yaml.safe_load(save_suite(loaded)), base=tmp_path / "other")
    assert again == loaded
