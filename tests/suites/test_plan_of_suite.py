"""What a suite file may say, which runs it plans and shares, and how long they will take."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from fabricate import BINARY
from kdlora.data.tasks import GLUE
from kdlora.errors import ConfigError
from kdlora.experiment.plan import make_plan, whole_config
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
SEEN = {"teacher": ModelLook(np.array([40]), 512, 768), "student": ModelLook(np.array([40]), 512, 384)}
CHOSEN = Chosen(SEEN, {"train": 1000}, BINARY)


def suite(**changes):
    return build_suite(SUITE | changes)


def plan(chosen=None, **changes):
    return make_plan(suite(**changes), chosen)


def arms(found, arm, task="cola"):
    return [run for run in found.runs() if (run.arm, run.task) == (arm, task)]


def test_nothing_is_made_twice():
    """A teacher that two families share, or a control for each alpha, would be trained over and over."""
    found = plan()
    assert [len(arms(found, arm)) for arm in SUITE["arms"]] == [2, 2, 2 * 2 * 2, 2 * 2]
    keys = {cell: {run.key for run in runs} for cell, runs in found.cells.items()}
    assert keys["cola", "one", "fft"] == keys["cola", "two", "fft"]
    assert not keys["cola", "one", "kd-lora"] & keys["cola", "two", "kd-lora"]

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
    smaller = {"data": {"path": "x/y"}, "teacher": {"train": {"micro_batch_tokens": 64}}}
    assert {run.key for run in plan(config=smaller).runs()} == base, "after a lack of memory a suite goes on"
    grids = {"fft": {"teacher.train.gradient_checkpointing": [False, True]}}
    assert len(arms(plan(grids=grids), "fft")) == 2 * len(arms(plan(grids={}), "fft")), "compared for memory"
    longer = {"data": {"path": "x/y"}, "student": {"train": {"max_length": 64}}}
    changed = {run.key for run in plan(config=longer).runs()}
    assert {key for key in changed & base if "/fft-" not in key} == set()
    assert {key for key in changed if "/fft-" in key} == {key for key in base if "/fft-" in key}

    # A control labelled "alpha 0.1" claims a distillation that it never had.
    assert {key for run in arms(plan(), "student-lora") for key, _ in run.settings} == {"lora.rank"}
    assert {key for run in arms(plan(), "kd-lora") for key, _ in run.settings} == {"lora.rank", "distil.alpha"}


def test_families_share_what_is_the_same():
    """Copies, or a rate of adapters, would train one teacher twice, and compare students of two; so would a head."""
    train = {
        "train": {
            "epochs": 3,
            "learning_rate": 2e-5,
            "head_learning_rate": None,
            "select": "last",
            "class_weights": None,
        }
    }
    families = {
        recipe: {"recipe": recipe, "teacher": {"model": "teacher"} | train, "student": {"model": "small"}}
        for recipe in ("default", "paper")
    }
    found = plan(families=families, grids={})
    assert {run.config.data.augment for run in arms(found, "kd-lora")} == {None, 0}
    assert len(arms(found, "fft")) == 1
    assert [len(lesson.candidates) for lesson in found.lessons()] == [1] * 4
    assert len({lesson.candidates[0].key for lesson in found.lessons()}) == 2
    families = {f"copied-{count}": families["paper"] | {"data": {"augment": count}} for count in (0, 1)}
    found = plan(families=families, grids={})
    assert [len(arms(found, arm)) for arm in ("fft", "kd-lora", "student-lora")] == [1, 2, 1]

    # The head of a control at another rate than that of `kd-fft`; teachers by adapters, alike but for the students.
    head = {"data": {"path": "x/y"}, "teacher": {"train": {"head_learning_rate": 2e-3}}}
    found = plan(config=head, arms=["kd-fft", "student-fft"], grids={})
    rates = {settings_for(run.config, run.arm).head_learning_rate for run in found.runs() if run.arm != "fft"}
    assert rates == {2e-3}
    lora = {"data": {"path": "x/y"}, "teacher": {"tuning": "lora", "adapter_learning_rate": 1e-3}}
    grid = {"adapters": {"student.train.learning_rate": [1e-3, 2e-3]}}
    found = plan(config=lora, arms=["lora", "kd-lora"], grids=grid, families={"one": SUITE["families"]["one"]})
    assert (len(arms(found, "lora")), len(arms(found, "kd-lora"))) == (1, 2)

    # A rate of adapters is none of a tuned teacher.
    data, student = {"data": {"path": "x/y"}, "teacher": {"model": "teacher"}}, {"model": "small"}
    families = {"open": {"student": student}, "set": {"student": student | {"train": {"learning_rate": 1e-4}}}}
    found = plan({("cola", family): CHOSEN for family in families}, families=families, grids={}, config=data)
    assert (len(arms(found, "fft")), len(arms(found, "lora"))) == (1, 2)


@pytest.mark.parametrize(
    ("name", "size", "fft", "adapters"), [("paper", (9, 3), 25, 24), ("paper-small", (5, 1), 2, 3)]
)
def test_the_papers_suites(name, size, fft, adapters):
    """The protocol is 25 configurations of FFT and 24 of the others; a slip in a grid changes it silently."""
    papers = load_suite(CONFIGS / f"{name}.yaml")
    assert (len(papers.tasks), len(papers.families)) == size
    found = make_plan(load_suite(CONFIGS / f"{name}.yaml", ["tasks=[sst2]"]))
    for (_, _, arm), runs in found.cells.items():
        assert len(runs) == (fft if arm == "fft" else adapters)


def test_an_open_max_length_is_filled_in_for_all_arms_alike():
    """A control that reads less of a text than the distilled arm measures the cut."""
    cut = {"data": {"path": "x/y"}, "student": {"train": {"max_length": 96}}}
    found = plan({("cola", "one"): CHOSEN}, config=cut)
    configs = {arm: found.cells["cola", "one", arm][0].config for arm in SUITE["arms"]}
    assert configs["fft"].teacher.train.max_length == configs["kd-lora"].teacher.train.max_length == 40
    assert {configs[arm].student.train.max_length for arm in ("lora", "kd-lora", "student-lora")} == {96}
    assert {run.config.teacher.train.max_length for run in found.runs() if run.task != "cola"} == {None}


FACTS = {
    name: TaskFacts(GLUE[name].task, {}, {DataConfig(path="x/y").row_settings: {"train": rows}}, ())
    for name, rows in (("cola", 1000), ("rte", 500))
}
LENGTHS = np.array([4, 6])  # five tokens a text
LOOKS = {"teacher": ModelLook(LENGTHS, 128, 768, seconds=1e-4), "student": ModelLook(LENGTHS, 128, 384, seconds=1e-5)}
TWO, FOUR = ({"epochs": epochs, "learning_rate": 1e-3, "max_length": 128} for epochs in (2, 4))


def test_a_suite_without_students_reads_as_its_teacher_does():
    """`lora` was trained, and failed when it was scored, with a message that asked for what had been set."""
    families = {"one": {"teacher": {"model": "teacher"}}}
    looked = {("cola", "one"): Chosen({"teacher": SEEN["teacher"]}, {"train": 1000}, BINARY)}
    for set_to, expected in ((None, 40), (24, 24)):
        common = {"data": {"path": "x/y"}, "teacher": {"train": {"max_length": set_to}}}
        found = plan(looked, arms=["fft", "lora"], grids={}, tasks=["cola"], families=families, config=common)
        assert {settings_for(run.config, run.arm).max_length for run in found.runs()} == {expected}


def test_epochs_go_by_the_rows_of_the_run():
    """38 passes over 8,500 texts that a grid had set were 10,108 steps, where an experiment takes 15."""
    few, many = {"train": 500}, {"train": 500, "unlabelled": 8000}
    grids = {"adapters": {"data.unlabelled": [None, "/more.csv"]}}
    data = {"data": {"train": "/train.csv"}}
    asked = {"tasks": {"mine": data}, "families": {"one": SUITE["families"]["one"]}, "config": {}, "grids": grids}
    for whole in (few, many):
        looked = {("mine", "one"): Chosen(SEEN, whole, BINARY)}
        there = {run.config.data.row_settings: run.config.data.unlabelled for run in plan(**asked).runs()}
        rows = {"mine": {key: many if one else few for key, one in there.items()}}
        found = make_plan(suite(**asked), looked, rows)
        for unlabelled, own in ((None, few), ("/more.csv", many)):
            made = [run.config for run in found.runs() if run.config.data.unlabelled == unlabelled and run.arm != "fft"]
            experiment = Chosen(SEEN, own, BINARY).fill_in(whole_config(suite(**asked), "mine", "one"))
            assert {one.student.train.epochs for one in made} == {experiment.student.train.epochs}


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


def test_an_override_changes_one_part_or_chooses_among_those_of_the_file():
    """A key of one task left out the eight others, and their tables; a pilot on one's own task was refused.

    The benchmark's own spelling of a task must not become a second task.
    """
    papers = load_suite(CONFIGS / "paper.yaml", ["tasks.mnli.data.max_train_examples=9"])
    assert len(papers.tasks) == 9
    assert papers.tasks["mnli"] == {"task": {"name": "mnli"}, "data": {"max_train_examples": 9}}
    papers = load_suite(CONFIGS / "paper.yaml", ["families.bert.teacher.model=/m/x"])
    assert papers.families["bert"] == {"family": "bert", "teacher": {"model": "/m/x"}}
    assert papers.families.keys() == {"bert", "deberta-v3", "roberta"}
    own = {name: {"task": {}, "data": {"path": f"x/{name}"}} for name in ("a", "b")}
    found = build_suite(SUITE | {"tasks": own}, ["tasks=[cola, a]", "families=two"])
    assert found.tasks == {"a": own["a"], "cola": {"task": {"name": "cola"}}}
    assert found.families == {"two": SUITE["families"]["two"]}
    spelt = ["tasks.SST-2.data.max_train_examples=9", "tasks.sst_2.data.max_length=8", "tasks.RTE.task.text=a"]
    found = build_suite(SUITE | {"tasks": ["SST-2", "rte"]}, spelt).tasks
    sst2 = {"task": {"name": "sst2"}, "data": {"max_train_examples": 9, "max_length": 8}}
    assert found == {"sst2": sst2, "rte": {"task": {"name": "rte", "text": "a"}}}
    named = {"SST-2": {"task": {"name": "sst2"}, "data": {"max_train_examples": 9}}, "rte": {}}
    assert build_suite(SUITE | {"tasks": named}, ["tasks=[sst2]"]).tasks == {"SST-2": named["SST-2"]}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"tasks": ["cloa"]}, "s: cloa, one.*task.name: input should be .*, got 'cloa'. Did you mean 'cola'"),
        ({"families": ["rberta"]}, "family: input should be .*, got 'rberta'. Did you mean 'roberta'"),
        ({"arms": ["kdlora"]}, "arms.0: input should be 'words', .*, got 'kdlora'. Did you mean 'kd-lora'"),
        ({"families": {"a/b": {}}}, "families.a/b.*should match pattern"),
        ({"seeds": [1, 1]}, "run.seeds holds a value twice"),
        ({"grids": {"adapters": {"lora.rank": []}}}, "grids.adapters.0: list should have at least 1 item"),
        ({"grids": {"adapters": {"lora.rank": 8}}}, "expected a list of values, got 8"),
        ({"config": {"run": {"seeds": [1]}}}, "config.run.seeds: a suite has `arms` and `seeds` at its top level"),
        ({"config": {"run": "arms"}}, "s: cola, one: run: expected keys such as .*, got 'arms'"),
        ({"config": {"report": {"paper": True}}}, "config.report.paper: a suite .* has the paper.*Delete the key"),
        ({"config": {"defer": {"error": 0.1}}}, "config.defer.error: a suite .* ships nothing"),
        ({"config": {"export": {"thresholds": 0.1}}}, "config.export.thresholds: a suite .* ships nothing"),
        ({"config": {"run": {"fail_fast": True}}}, "config.run.fail_fast: a suite .* carries out all runs"),
        (
            {"grids": {"full_students": {"student.train.learning_rate": [1e-3]}}},
            "the rate of these arms is student.full",
        ),
        (
            {"tasks": {"cola": {"export": {"thresholds": "f1"}}}},
            "tasks.cola.export.thresholds: a suite .* ships nothing",
        ),
        ({"families": {"one": {"run": {"seeds": [1]}}}}, "families.one.run.seeds: a suite has `arms` and `seeds`"),
        ({"families": {"bert": {"family": "bert", "teacher": {"fine_tuned": "one"}}}}, "a suite trains its teachers"),
        ({"config": {"teacher": 5}}, "s: cola, one: teacher: expected keys such as 'model:', got 5"),
        ({"grids": {"adapters": {"lora.rank": [8, 0]}}}, "s: cola, one, lora.*lora.rank"),
        (
            {"grids": {"adapters": {"data.max_train_examples": [40, 80]}}},
            "grids: data.max_train_ex.* is of rows",
        ),
        ({"grids": {"fft": {"data.split_seed": [1, 2]}}}, "grids: data.split_seed is of rows"),  # validation was learnt
        (
            {"grids": {"adapters": {"teacher.train.epochs": [1, 2]}}},
            "grids: teacher.train.epochs is of the one teacher of all kd",
        ),
        ({"grids": {"fft": {"teacher.model": ["a", "b"]}}}, "fft: teacher.model names a model, which has a rate of"),
        ({"grids": {"full_students": {"student.model": ["a", "b"]}}}, "full_students: student.model names a model"),
        ({"grids": {"fft": {"student.train.epochs": [1, 2]}}}, "fft: student.train.epochs changes nothing"),
        ({"grids": {"adapters": {"run.seeds": [[0], [1]]}}}, "adapters: run.seeds changes nothing"),
        ({"grids": {"adapters": {"task.metric": ["accuracy"]}}}, "adapters: task.metric changes nothing"),
        ({"grids": {"adapters": {"lora.rnak": [8]}}}, "lora.rnak: unknown key. Did you mean 'rank'"),
    ],
)
def test_faults_are_told(changes, expected):
    """A slip that passes costs a week of wrong runs; one teacher of all tasks would be that of the wrong labels."""
    with pytest.raises(ConfigError, match=f"(?s){expected}"):
        plan(**changes)


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
    # Names of splits stay names where another part has the data set.
    name, source = {"validation": "validation_matched"}, {"path": "nyu-mll/glue"}
    for common, own in ((source, name), (name, source)):
        found = build_suite(SUITE | {"config": {"data": common}, "tasks": {"m": {"data": own}}})
        assert {**found.config["data"], **found.tasks["m"]["data"]} == name | source
    again = build_suite(yaml.safe_load(save_suite(loaded)), base=tmp_path / "other")
    assert again == loaded
    texts = {"data.unlabelled": [None, "more.csv"], "distil.alpha": [0.1, 0.5]}
    joint = [{"data.unlabelled": "more.csv", "distil.alpha": 0.1}]
    found = build_suite(SUITE | {"config": {}, "grids": {"adapters": [texts, joint]}}, base=tmp_path).grids.adapters
    more = str(tmp_path / "more.csv")
    assert found[0] == ({"data.unlabelled": None}, {"data.unlabelled": more})
    assert found[2] == ({"data.unlabelled": more, "distil.alpha": 0.1},)
