"""The comparison of recipes: what is tuned on what, what is shared, and that nothing is done twice."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import study as study_command
import study_runs
from study import UNFINISHED, ready_work
from study_plan import Places, Study, Work, choose_point, configure, grid_points, read_study, teacher_of, work_of
from study_runs import claimed, watched_splits, with_labelled_copies, write_tables

from kdlora.config import DataConfig, StudentTrainConfig, TaskConfig
from kdlora.data.load import load_splits
from kdlora.experiment.arms import rows_per_epoch

STUDIES = sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.yaml"))
VALUES = {
    "teacher": "large",
    "student": "small",
    "base": {"recipe": "paper", "student": {"train": {"epochs": 4}}},
    "tasks": {"one": {"glue": "cola", "rows": 100}, "two": {"glue": "mrpc", "rows": 100}},
    "search": {"tasks": ["one"], "grid": {"student.train.learning_rate": [1e-3, 1e-2]}},
    "recipes": {
        "paper-tuned": {},
        "mse": {"settings": {"distil": {"loss": "mse"}}, "grid": {"distil.alpha": [0.1, 0.5]}},
        "full": {"arms": ["student-fft"], "grid": {"student.full_learning_rate": [1e-4]}},
    },
    "contrasts": [["paper-tuned/kd-lora", "paper-tuned/student-lora"], ["mse/kd-lora", "full/student-fft"]],
    "steps": [{"recipes": ["paper-tuned", "mse", "full"], "tasks": ["one", "two"], "seeds": [0, 1]}],
}
PLACES = Places(Path("/models"), Path("/glue"), Path("/out"))


@pytest.fixture
def study() -> Study:
    return Study.model_validate(VALUES)


def test_a_study_extends_another(tmp_path):
    """A copy of the shared keys that went its own way would compare recipes on other tasks than it says."""
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(VALUES), encoding="utf-8")
    own = {"extends": "first.yaml", "student": "other", "recipes": {"paper-tuned": {}, "full": {}, "mse": {}}}
    (tmp_path / "second.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    first, second = read_study(tmp_path / "first.yaml"), read_study(tmp_path / "second.yaml")
    assert second.model_copy(update={"student": "small", "recipes": first.recipes}) == first
    assert (second.student, second.recipes["mse"].settings) == ("other", {})


def carry_out_all(study: Study, score) -> list[Work]:
    """Walk through a study as `run` does, with invented scores."""
    scores: dict[str, float] = {}
    done: list[Work] = []
    while work := next(ready_work(study, PLACES, scores), None):
        done.append(work)
        scores[work.key] = score(work)
    return done


def test_what_another_process_does_is_left_to_it(study, tmp_path):
    """Two processes that share a study must not train the same twice, nor wait for each other."""
    places = Places(Path("/models"), Path("/glue"), tmp_path)
    work = next(ready_work(study, places, {}))
    with claimed(work, places) as first, claimed(work, places) as second:
        assert (first, second) == (True, False)
    with claimed(work, places) as again:
        assert again
    places.run(work).write_text("{}", encoding="utf-8")
    with claimed(work, places) as finished:
        assert not finished


def test_nothing_is_trained_twice_and_controls_are_shared(study):
    """A control trained anew for every loss would cost as much as the recipes themselves."""
    done = carry_out_all(study, lambda work: work.config.student.train.learning_rate)
    assert len({work.key for work in done}) == len(done)
    counts = {arm: sum(work.arm == arm and not work.held_out for work in done) for arm in ("fft", "student-lora")}
    assert counts == {"fft": 2, "student-lora": 4}  # a teacher a task; two tasks and two seeds, once for both recipes
    assert sum(work.arm == "kd-lora" and not work.held_out for work in done) == 8


def test_a_teacher_comes_before_its_students(study):
    """A student whose teacher is not there yet would end the study."""
    seen = set()
    for work in carry_out_all(study, lambda work: 0.0):
        if work.arm == "fft":
            seen.add((work.task, work.held_out))
        assert work.arm != "kd-lora" or (work.task, work.held_out) in seen
    assert seen == {("one", 0.2), ("one", 0.0), ("two", 0.0)}, "rows that choose a recipe were known to its teacher"


def test_values_are_chosen_on_held_out_training_rows_and_only_there(study):
    """Tuning on the reported rows would report the luck of the draw as a gain."""
    done = carry_out_all(study, lambda work: work.config.student.train.learning_rate * (100 if work.held_out else -1))
    searches = [work for work in done if work.held_out]
    assert {work.held_out for work in searches} == {0.2}
    assert {work.config.student.train.epochs for work in searches} == {5.0}  # as many steps as 4 epochs of all rows
    assert {work.task for work in searches} == {"one"}
    reported = [work for work in done if not work.held_out and work.arm in ("kd-lora", "student-lora")]
    assert {work.config.student.train.learning_rate for work in reported} == {1e-2}
    assert {work.config.student.train.epochs for work in reported} == {4.0}


def test_a_searchs_teacher_has_not_seen_its_rows(study):
    """A teacher that was trained on the held-out rows gives their labels away, and favours what follows it closest."""
    for work in carry_out_all(study, lambda work: 0.0):
        teacher = teacher_of(work)
        assert (teacher.held_out, teacher.split_seed) == (work.held_out, work.split_seed)
        if work.arm == "kd-lora" and work.held_out:
            assert teacher.key != teacher_of(dataclasses.replace(work, held_out=0.0)).key


def test_every_recipe_takes_the_same_grid_and_a_control_nothing_of_the_teacher(study):
    """A recipe with more rates to choose from would win by choice."""
    assert len(grid_points(study, "paper-tuned", "kd-lora")) == 2
    assert len(grid_points(study, "mse", "kd-lora")) == 4
    assert grid_points(study, "mse", "student-lora") == grid_points(study, "paper-tuned", "student-lora")
    assert grid_points(study, "full", "student-fft") == [{"student.full_learning_rate": 1e-4}]


def test_the_best_point_on_the_mean_is_chosen(study):
    """The last or the first point of the grid would look as plausible."""
    point, missing = choose_point(study, PLACES, "mse", "kd-lora", {})
    assert point is None
    assert len(missing) == 4
    best = next(work for work in missing if work.config.distil.alpha == 0.5)
    scores = {work.key: float(work is best) for work in missing}
    chosen, missing = choose_point(study, PLACES, "mse", "kd-lora", scores)
    assert missing == []
    assert chosen == {"student.train.learning_rate": best.config.student.train.learning_rate, "distil.alpha": 0.5}


def test_what_an_arm_reads_is_in_its_key(study):
    """A key that misses a setting gives one recipe's score to another."""
    base = configure(study, PLACES, "one", "paper-tuned", {})
    changed = configure(study, PLACES, "one", "mse", {"lora.rank": 4})
    variants = [
        Work("one", arm, seed, config, held_out)
        for arm, seed, config, held_out in itertools.product(
            ("kd-lora", "student-lora", "student-fft"), (0, 1), (base, changed), (0.0, 0.2)
        )
    ]
    assert Work("two", "student-lora", 0, base).key != Work("one", "student-lora", 0, base).key
    same = [work for work in variants if work.arm == "student-fft" and work.config is changed]  # no adapter, no teacher
    assert len({(work.arm, work.key) for work in variants}) == len(variants) - len(same)


def write_ratings(models: Path) -> None:
    """Write 60 rated sentences where vader's files lie."""
    words = ["good", "bad", "dull", "fine"]
    lines = [f"{row}\t{row % 4 - 1.5}\ta {words[row % 4]} film number {row}" for row in range(60)]
    (models / "vader").mkdir(parents=True)
    (models / "vader" / "ratings.txt").write_text("\n".join(lines), encoding="utf-8")


def rated_study(folder: Path) -> tuple[Study, Places]:
    """Give a study of ratings whose recipe `texts` takes 20 of the rows that the task leaves."""
    write_ratings(folder)
    values = {
        **VALUES,
        "tasks": {"ratings": {"vader": "ratings.txt", "rows": 10}},
        "search": {**VALUES["search"], "tasks": ["ratings"]},
        "recipes": {**VALUES["recipes"], "texts": {"unlabelled": 20}},
        "steps": [{"recipes": ["texts"], "tasks": ["ratings"]}],
    }
    return Study.model_validate(values), Places(folder, folder, folder / "out")


def test_a_searched_training_draws_as_many_rows_and_no_held_out_text(tmp_path):
    """Half of the steps favours high rates; copies made of all rows carry halves of the rows that are scored."""
    study, places = rated_study(tmp_path)
    write_tables(study, places)
    config = configure(study, places, "ratings", "paper-tuned", {"data.augment": 8})
    work = Work("ratings", "kd-lora", 0, config)
    whole, held = (study_runs._splits(dataclasses.replace(work, held_out=share)) for share in (0.0, 0.5))
    assert len(held.train) == len(held.validation) == 5
    assert rows_per_epoch(whole) == rows_per_epoch(held) == 10
    numbers = {text.split()[-1] for text in held.validation["text"]}
    assert not numbers & {word for text in held.unlabelled["text"] for word in text.split()}
    part, share = (rows_per_epoch(watched_splits(one, StudentTrainConfig(select="best"))) for one in (held, whole))
    assert abs(part - share) <= 1, "the rows that choose an epoch are a share of these, to rounding"


def test_processes_that_start_together_write_the_tables_once(tmp_path, monkeypatch):
    """Two that wrote the same partial file took it away from each other, and one of them died."""
    study, places = rated_study(tmp_path)
    written = []
    write_table = study_runs._write_table

    def slow_write_table(file: Path, columns, rows) -> None:
        written.append(file.name)
        time.sleep(0.1)
        write_table(file, columns, rows)

    monkeypatch.setattr(study_runs, "_write_table", slow_write_table)
    with ThreadPoolExecutor(2) as pool:
        for process in [pool.submit(write_tables, study, places) for _ in range(2)]:
            process.result()
    assert written == ["ratings.csv", "ratings-unlabelled.csv"]


def test_texts_without_labels_are_other_rows(tmp_path):
    """Texts that are labelled rows, or scored ones, would make the curve of more texts flat, or too steep."""
    study, places = rated_study(tmp_path)
    write_tables(study, places)
    config = configure(study, places, "ratings", "texts", {})
    splits = load_splits(config.task, config.data)
    without = configure(study, places, "ratings", "paper-tuned", {})
    assert without.data.unlabelled is None
    assert splits.unlabelled is not None
    assert len(splits.unlabelled) == 20
    assert not set(splits.unlabelled["text"]) & {*splits.train["text"], *splits.validation["text"]}
    for arm in ("kd-lora", "student-lora"):
        assert Work("ratings", arm, 0, config).key != Work("ratings", arm, 0, without).key
    assert Work("ratings", "fft", 0, config).key == Work("ratings", "fft", 0, without).key


def test_an_epoch_is_chosen_by_training_rows(tmp_path):
    """Scored rows that choose the epoch would report the luckiest of ten epochs as the recipe's gain."""
    task = {"kind": "regression", "text": "text", "label": "rating"}
    file = tmp_path / "ratings.csv"
    file.write_text("id,rating,text\n" + "".join(f"{row},{row % 4},a film of {row}\n" for row in range(60)), "utf-8")
    splits = load_splits(TaskConfig(**task), DataConfig(train=str(file), validation_fraction=0.5, augment=2))
    last = watched_splits(splits, StudentTrainConfig())
    assert (len(last.train), last.copies) == (30, 60)
    best = watched_splits(splits, StudentTrainConfig(select="best"))
    assert (len(best.train), len(best.validation), best.copies) == (27, 3, 54)
    assert best.unlabelled is not None
    assert {name.partition("~")[0] for name in best.unlabelled["id"]} == set(best.train["id"])
    assert {*best.train["id"], *best.validation["id"]} == set(splits.train["id"])


def test_a_control_with_the_copies_takes_the_labels_of_their_texts(tmp_path):
    """A copy with another text's label would make the control weak, and the teacher's gain large."""
    task = {"kind": "regression", "text": "text", "label": "rating"}
    file = tmp_path / "ratings.csv"
    file.write_text("id,rating,text\n" + "".join(f"r~{row},{row},a film of {row}\n" for row in range(20)), "utf-8")
    splits = load_splits(TaskConfig(**task), DataConfig(train=str(file), validation_fraction=0.5, augment=3))
    joined = with_labelled_copies(splits)
    assert (len(joined.train), joined.unlabelled, joined.copies) == (40, None, 0)
    assert joined.train.features == splits.train.features
    of_text = dict(zip(splits.train["id"], splits.train["label"], strict=True))
    for name, label in list(zip(joined.train["id"], joined.train["label"], strict=True))[10:]:
        assert label == of_text[name.rpartition("~")[0]]


def test_a_control_with_copies_is_another_training_and_its_student_the_same():
    """A control of the same key as the plain one would report that one's score; a student of another, train twice."""
    recipes = {
        name: {"settings": {"data": {"augment": copies}}, "copied_labels": labelled}
        for name, copies, labelled in (("plain", 2, False), ("two", 2, True), ("four", 4, True))
    }
    study = Study.model_validate({**VALUES, "recipes": {**VALUES["recipes"], **recipes}})
    keys = {
        (name, arm): work_of(study, PLACES, name, arm, {}, "one", 0).key
        for name in recipes
        for arm in ("kd-lora", "student-lora")
    }
    assert keys["two", "kd-lora"] == keys["plain", "kd-lora"]
    assert len({keys[name, "student-lora"] for name in recipes}) == 3


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_can_be_read(path):
    """A misspelt setting in a study would show after hours."""
    study = read_study(path)
    for recipe, task in itertools.product(study.recipes, study.tasks):
        for arm in study.recipes[recipe].arms:
            for point in grid_points(study, recipe, arm):
                configure(study, PLACES, task, recipe, point)


def test_a_study_runs_stops_resumes_and_reports(tiny_model_folder, tmp_path, capsys, monkeypatch):
    """The loop and the tables read what real trainings write; invented records would hide a misspelt key."""
    import shutil

    models = tmp_path / "models"
    for name, family in (("large", "bert"), ("small", "distilbert")):
        shutil.copytree(tiny_model_folder(family), models / name)
    write_ratings(models)
    small = {
        **VALUES,
        "base": {
            "recipe": "paper",
            "teacher": {"train": {"epochs": 1, "batch_size": 8}},
            "student": {"train": {"epochs": 1, "batch_size": 8}},
        },
        "tasks": {"ratings": {"vader": "ratings.txt", "rows": 24}, "few": {"vader": "ratings.txt", "rows": 12}},
        "search": {"tasks": ["ratings"], "grid": {"student.train.learning_rate": [1e-3, 1e-2]}},
        "recipes": {
            **VALUES["recipes"],
            "texts": {"unlabelled": 20},
            "copies": {
                "settings": {"data": {"augment": 2}},
                "arms": ["student-lora"],
                "copied_labels": True,
            },
            "large": {"arms": ["lora"]},
        },
        "steps": [
            {
                "recipes": ["paper-tuned", "mse", "full", "texts", "copies", "large"],
                "tasks": ["ratings"],
                "seeds": [0, 1],
            }
        ],
    }
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump(small), encoding="utf-8")
    command = ["study.py", str(file), "--models", str(models), "--glue", str(tmp_path), "--out", str(tmp_path / "out")]

    def call(*more: str) -> int:
        monkeypatch.setattr(sys, "argv", [*command, *more])
        return study_command.main(study_command.read_options())

    assert call("--minutes", "0") == UNFINISHED
    assert call() == 0
    records = sorted((tmp_path / "out").glob("*/*.json"))
    first = [json.loads(path.read_text(encoding="utf-8")) for path in records]
    assert call() == 0
    assert "0 trainings are recorded" in capsys.readouterr().out
    assert [json.loads(path.read_text(encoding="utf-8")) for path in records] == first
    assert call("--report", "--draws", "50") == 0
    table = capsys.readouterr().out
    assert table.count("% (1 tasks, n = 2)") >= 12  # shares of the teacher, and of its size with adapters
    assert "97.50%" in table  # two contrasts are declared
    assert re.search(r"paper-tuned `kd-lora` − paper-tuned `student-lora` \| [+-]\d.* \| 2 \| 1 \|", table)
    assert call("--report", "--draws", "50", "--tasks", "few") == 0
    assert "| arm | few | mean |" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*/*.checkpoints"))
