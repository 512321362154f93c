"""The benchmark of a stranger's first run: what is drawn, what is set, what is trained once, and what is claimed."""

import json
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
import strangers
from strangers import UNFINISHED, read_options
from strangers_plan import Plan, configure, plan_jobs, read_plan
from strangers_report import collect, count_claims

from experiments import read_rows
from fabricate import ship
from kdlora.evidence.records import ExperimentLayout
from sentences import tagged_rows, write_conll
from tiny import sentiment_rows, write_csv

PLAN = Path(strangers.__file__).with_suffix(".yaml")


def call(*arguments: object) -> int:
    """Run the command as the shell would."""
    options = read_options([str(argument) for argument in arguments])
    return options.action(options)


def write_sources(folder: Path) -> None:
    """Write a quoted CSV, a GLUE file with a byte-order mark and bare quotes, and rated sentences of reviews."""
    rows = sentiment_rows(80)
    moods = [{"review": f"{row['text']},\n{place}", "mood": row["label"]} for place, row in enumerate(rows)]
    write_csv(folder / "mood.csv", moods)
    lines = [f'{place}\t"{row["text"]}\tagain {place}\t{place % 4 // 3}' for place, row in enumerate(rows)]
    (folder / "pairs.tsv").write_text(
        "\n".join(["no\t#1 Text\t#2 Text\tsame", *lines, "81\tcut"]), encoding="utf-8-sig"
    )
    rated = [
        f"{place // 4}_{place % 4}\t{1.5 if row['label'] == 'positive' else -1.5}\t{row['text']} {place}\r\n"
        for place, row in enumerate(rows)
    ]
    (folder / "rated.txt").write_text("".join(rated), encoding="utf-8", newline="")


SMALL = """
seeds: [0, 1]
sets:
  mood: {half: reported, train: mood.csv, test: mood.csv, columns: {text: review, mood: mood}, rows: 32}
  pairs:
    half: tuning
    train: pairs.tsv
    test: pairs.tsv
    columns: {one: "#1 Text", two: "#2 Text", label: same}
    names: {"0": other, "1": same}
    rows: 40
  rated:
    {half: tuning, train: rated.txt, group: 0, header: false, columns: {text: 2, rating: 1}, format: jsonl, rows: 40}
  long: {half: guard, train: mood.csv, test: mood.csv, columns: {text: review, mood: mood}, join: 10}
pairs:
  small: {teacher: bert, student: distilbert, sets: [mood], settings: [default, full, taught]}
  broken: {teacher: nowhere, student: distilbert, sets: [mood], settings: [default], rows: 20}
  drawn: {teacher: bert, layers: [1], sets: [pairs, rated, long], settings: []}
settings:
  default:
    arms: [fft, kd-lora, student-lora, words]
    config: &short
      recipe: paper
      teacher: {train: {epochs: 1}}
      student: {train: {epochs: 1, learning_rate: 5.0e-3}}
      run: {threads: 1, precision: fp32}
      export: {formats: [], benchmark: false}
  full: {arms: [student-fft], grid: {student.full_learning_rate: [1.0e-6, 5.0e-3]}, config: *short}
  taught: {arms: [kd-lora], teacher_of: default, config: *short}
contrasts:
  distillation: {first: [default/kd-lora], second: [default/student-lora]}
  students: {first: [default/kd-lora], second: [default/student-lora, full/student-fft]}
  shipped: {first: [default/shipped], second: [default/kd-lora, full/student-fft]}
"""


@pytest.fixture
def prepared(tmp_path, tiny_model_folder) -> Path:
    """A folder that `prepare` filled."""
    (tmp_path / "sources").mkdir()
    write_sources(tmp_path / "sources")
    for name in ("bert", "distilbert"):
        shutil.copytree(tiny_model_folder(name), tmp_path / "models" / name)
    (tmp_path / "plan.yaml").write_text(SMALL, encoding="utf-8")
    places = ("--data", tmp_path / "sources", "--models", tmp_path / "models", "--out", tmp_path / "out")
    assert call("prepare", "--plan", tmp_path / "plan.yaml", *places) == 0
    return tmp_path / "out"


def test_the_repositorys_plan_sets_nothing(tmp_path):
    """A rate or an epoch that crept into the plan would make its figures another product's than the user's."""
    plan = read_plan(PLAN)
    assert plan.settings["default"].config == plan.settings["plain"].config == {}
    jobs = list(plan_jobs(plan))
    for job in jobs:
        config = configure(plan, job, tmp_path, tmp_path)
        assert config.run.seeds == (plan.pairs[job.pair].seeds or plan.seeds)
    assert len({job.name for job in jobs}) == len(jobs)
    halves = {half: [name for name, own in plan.sets.items() if own.half == half] for half in ("tuning", "reported")}
    assert all(set(pair.sets) & set(halves["tuning"]) for pair in plan.pairs.values() if len(pair.sets) > 1)
    assert count_claims(plan) == 12  # four contrasts, three pairs with reported sets


def test_a_name_that_the_plan_does_not_declare_is_refused(tmp_path):
    """A misspelt side would be a contrast that is silently never printed."""
    (tmp_path / "plan.yaml").write_text(SMALL.replace("first: [default/kd-lora]", "first: [default/kd-lroa]"))
    with pytest.raises(SystemExit, match="default/kd-lroa"):
        read_plan(tmp_path / "plan.yaml")


def test_settings_are_laid_over_the_bare_config(prepared):
    """A recipe whose texts came from elsewhere, or whose teacher was another, would be compared with what it is not."""
    values = read_plan(prepared / "strangers.yaml").model_dump()
    values["settings"]["texts"] = {"config": {"data": {"unlabelled": "unlabelled.csv", "max_unlabelled_examples": 9}}}
    values["pairs"] = {"small": values["pairs"]["small"] | {"settings": ["default", "taught", "texts"]}}
    plan, models = Plan.model_validate(values), prepared.parent / "models"
    configs = {job.settings: configure(plan, job, prepared, models) for job in plan_jobs(plan)}
    assert Path(configs["texts"].data.unlabelled) == prepared / "data/mood/unlabelled.csv"
    assert configs["texts"].data.train == configs["default"].data.train
    assert configs["taught"].teacher.fine_tuned == str(prepared / "runs/small/mood/default/teacher")
    assert configs["taught"].teacher.model == configs["default"].teacher.model


def test_prepare_writes_what_a_stranger_has(prepared):
    """Rows lost to a quote, classes out of proportion, or a review on both sides of a split would bend every score."""
    mood = read_rows(prepared / "data/mood/train-32.csv")
    assert sorted(row["mood"] for row in mood) == ["negative"] * 16 + ["positive"] * 16
    assert all(",\n" in row["text"] for row in mood)
    rest = {row["text"] for row in read_rows(prepared / "data/mood/unlabelled.csv")}
    assert rest | {row["text"] for row in mood} == {row["text"] for row in read_rows(prepared / "data/mood/test.csv")}
    assert len(rest) == 80 - 32  # the smaller draw of another pair is among the larger one's rest, or in it
    pairs = read_rows(prepared / "data/pairs/train-40.csv")
    assert [row["label"] for row in pairs].count("same") == 10
    assert all(row["one"].startswith('"') for row in pairs)
    rated = {
        name: [json.loads(line) for line in (prepared / f"data/rated/{name}.jsonl").read_text("utf-8").splitlines()]
        for name in ("train-40", "test")
    }
    reviews = {name: {int(row["text"].split()[-1]) // 4 for row in rows} for name, rows in rated.items()}
    assert len(rated["test"]) == 20
    assert {type(row["rating"]) for row in rated["train-40"]} == {float}
    assert not reviews["train-40"] & reviews["test"]
    long = read_rows(prepared / "data/long/train.csv")
    assert [row["mood"] for row in long].count("positive") == 4
    assert all(row["text"].count(",\n") == 10 for row in long)


def test_the_plan_holds_once_something_ran(prepared):
    """Contrasts chosen after the figures are known are no longer declared."""
    (prepared / "runs").mkdir()
    plan = prepared.parent / "plan.yaml"
    plan.write_text(plan.read_text("utf-8").replace("seeds: [0, 1]", "seeds: [7, 1]"), encoding="utf-8")
    places = ("--data", prepared.parent / "sources", "--models", prepared.parent / "models", "--out", prepared)
    with pytest.raises(SystemExit, match="another plan"):
        call("prepare", "--plan", plan, *places)


def test_it_stops_when_the_time_is_over(prepared, monkeypatch, capsys):
    """A benchmark that overran its minutes would be killed, and count the lost time as nothing."""
    monkeypatch.setattr(strangers, "run_experiment", lambda config, out: time.sleep(30))
    begin = time.monotonic()
    assert call("run", "--out", prepared, "--pairs", "small", "--sets", "mood", "--minutes", 0.01) == UNFINISHED
    assert time.monotonic() - begin < 20
    states = [json.loads(path.read_text("utf-8")) for path in prepared.glob("runs/small/mood/*.json")]
    assert [state["finished"] for state in states] == [False]
    assert states[0]["seconds"] > 0.3
    assert "work is left" in capsys.readouterr().out


def test_it_runs_resumes_reports_and_keeps(prepared, capsys):
    """The tables read what real experiments write; a side, a grid's winner or a sign mixed up would look plausible."""
    assert call("run", "--out", prepared) == 1  # one pair has no teacher; the others are done all the same
    told = capsys.readouterr().out
    assert "nowhere" in told
    records = {path: path.stat().st_mtime_ns for path in prepared.glob("runs/small/*/*/results.json")}
    assert len(records) == 4
    assert not list(prepared.glob("runs/small/*/*/student")) + list(prepared.glob("runs/small/*/*/runs/*/adapter"))
    assert list(prepared.glob("runs/small/*/default/teacher/model.safetensors"))
    assert call("run", "--out", prepared, "--pairs", "small") == 0
    assert {path: path.stat().st_mtime_ns for path in records} == records

    assert call("report", "--out", prepared, "--draws", 50) == 0
    table, plan = capsys.readouterr().out, read_plan(prepared / "strangers.yaml")
    shop = strangers.open_workshop(prepared)
    figures = collect(plan, prepared, {job: shop.state(job) for job in plan_jobs(plan)}, 50)
    assert figures["unfinished"] == ["broken/mood/default"]
    cell = next(cell for cell in figures["cells"] if cell["set"] == "mood")
    test = {side: sum(run["test"] for run in runs) / 2 for side, runs in cell["sides"].items()}
    gain = cell["contrasts"]["distillation"]
    assert gain["difference"] == pytest.approx(test["default/kd-lora"] - test["default/student-lora"])
    assert gain["low"] <= gain["difference"] <= gain["high"]
    better = max("default/student-lora", "full/student-fft", key=lambda side: test[side])
    assert cell["contrasts"]["students"]["second"] == better
    assert cell["experiments"]["full"]["point"] == {"student.full_learning_rate": best_rate(prepared)}
    assert {(mean["half"], mean["level"]) for mean in figures["means"]} == {
        ("reported", 1 - 0.05 / 4)
    }  # three claims of one pair, one of another
    taught = [{**run, "train_seconds": None} for run in cell["sides"]["taught/kd-lora"]]
    assert taught == [{**run, "train_seconds": None} for run in cell["sides"]["default/kd-lora"]]  # by the same teacher
    assert "| mood | reported | 2 classes |" in table


def best_rate(prepared: Path) -> float:
    """Find the rate whose runs are better on validation, from the records themselves."""
    scores = {}
    for rate in (1e-6, 5e-3):
        records = json.loads((prepared / f"runs/small/mood/full-{rate}/results.json").read_text("utf-8"))
        scores[rate] = sum(run["score"] for run in records["runs"])
    return max(scores, key=lambda rate: scores[rate])


def test_a_set_may_be_cut_by_class(tmp_path):
    """A cut that takes the first rows, or cuts the test file, too, is another set than the one that is declared."""
    (tmp_path / "sources").mkdir()
    write_sources(tmp_path / "sources")
    plan = SMALL.replace(
        "columns: {text: review, mood: mood}, rows: 32}", "columns: {text: review, mood: mood}, cut: {positive: 3}}"
    )
    (tmp_path / "plan.yaml").write_text(plan, encoding="utf-8")
    places = ("--data", tmp_path / "sources", "--models", tmp_path / "models", "--out", tmp_path / "out")
    assert call("prepare", "--plan", tmp_path / "plan.yaml", *places) == 0
    folder = tmp_path / "out" / "data" / "mood"
    assert Counter(row["mood"] for row in read_rows(folder / "train.csv")) == {"negative": 40, "positive": 3}
    assert Counter(row["mood"] for row in read_rows(folder / "test.csv")) == {"negative": 40, "positive": 40}
    (tmp_path / "plan.yaml").write_text(plan.replace("positive: 3", "positive: 300"), encoding="utf-8")
    with pytest.raises(SystemExit, match="has 40 rows of 'positive', fewer than the 300 of the plan"):
        call("prepare", "--plan", tmp_path / "plan.yaml", *places)


SPANS = """
seeds: [0]
sets:
  films: {half: reported, train: [one.conll, two.conll], validation: three.conll, test: three.conll, format: conll}
pairs:
  small: {teacher: bert, student: distilbert, sets: [films], settings: [default], rows: 30}
settings:
  default:
    arms: [fft, kd-lora, student-lora]
    config:
      recipe: paper
      teacher: {train: {epochs: 6, batch_size: 4, learning_rate: 1.0e-2}}
      student: {train: {epochs: 4, batch_size: 4, learning_rate: 1.0e-2}}
      run: {threads: 1, precision: fp32}
      export: {formats: [], benchmark: false}
contrasts:
  distillation: {first: [default/kd-lora], second: [default/student-lora]}
"""


def test_a_set_of_spans_is_scored_by_entities(tmp_path, tiny_model_folder, capsys):
    """Sentences torn apart, or contrasts over words in place of sentences, would give figures of the same look."""
    for number, name in enumerate(("one", "two", "three")):
        write_conll(tmp_path / f"{name}.conll", tagged_rows(20, seed=number))
    for name in ("bert", "distilbert"):
        shutil.copytree(tiny_model_folder(name), tmp_path / "models" / name)
    (tmp_path / "plan.yaml").write_text(SPANS, encoding="utf-8")
    places = ("--data", tmp_path, "--models", tmp_path / "models", "--out", tmp_path / "out")
    assert call("prepare", "--plan", tmp_path / "plan.yaml", *places) == 0
    drawn = (tmp_path / "out/data/films/train-30.conll").read_text("utf-8").strip().split("\n\n")
    given = [(tmp_path / f"{name}.conll").read_text("utf-8").strip().split("\n\n") for name in ("one", "two")]
    assert len(drawn) == 30
    assert set(drawn) <= {*given[0], *given[1]}
    assert call("run", "--out", tmp_path / "out") == 0
    ship(ExperimentLayout(tmp_path / "out/runs/small/films/default"))
    capsys.readouterr()
    assert call("report", "--out", tmp_path / "out", "--draws", 50) == 0
    table, shop = capsys.readouterr().out, strangers.open_workshop(tmp_path / "out")
    figures = collect(shop.plan, shop.out, {job: shop.state(job) for job in plan_jobs(shop.plan)}, 50)
    (cell,) = figures["cells"]
    score = {side: run["test"] for side, (run,) in cell["sides"].items()}
    gain = cell["contrasts"]["distillation"]
    assert gain["difference"] == pytest.approx(score["default/kd-lora"] - score["default/student-lora"])
    assert "| films | reported | 3 types | 30 / 20 |" in table
    assert "| 91.0; 640/s, 30.5 x fp32 |" in table
