"""The benchmark of a stranger's first run: what is drawn, what is set, what is trained once, and what is claimed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import strangers
from strangers import read_options
from strangers_plan import configure, plan_jobs, read_plan
from strangers_report import count_claims

from experiments import read_rows
from fabricate import make_experiment
from tiny import sentiment_rows, write_csv

PLAN = Path(strangers.__file__).with_suffix(".yaml")


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
seeds: [0]
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
  mixed: &mixed
    {half: guard, train: mood.csv, test: mood.csv, columns: {text: review, moods: mood}, format: jsonl, mixed: 3}
  few: {<<: *mixed, kept: [positive]}
  tail: {half: guard, train: mood.csv, test: mood.csv, columns: {text: review, mood: mood}, tail: 3}
pairs:
  small: {teacher: bert, student: distilbert, sets: [mood], settings: [default]}
  fewer: {teacher: bert, student: distilbert, sets: [mood], settings: [default], rows: 20}
  drawn: {teacher: bert, layers: [1], sets: [pairs, rated, long, mixed, few, tail], settings: []}
settings:
  default: {arms: [kd-lora, student-lora]}
contrasts:
  distillation: {first: [default/kd-lora], second: [default/student-lora]}
"""


def prepare(folder: Path, plan: str = SMALL) -> Path:
    """Call `strangers.py prepare` in a folder with sources; give the folder that it fills."""
    (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    places = {"plan": folder / "plan.yaml", "data": folder, "models": folder, "out": folder / "out"}
    options = read_options(["prepare", *(f"--{name}={place}" for name, place in places.items())])
    assert options.action(options) == 0
    return folder / "out"


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


def test_what_is_kept_of_one_teacher_speaks_of_every_students_seed(tmp_path, capsys):
    """Paired by seed alone, two of three students would be left out, and a mean of them said nothing of seeds."""
    write_sources(tmp_path)
    taught = (
        "teacher: {arms: [fft], config: {run: {seeds: [0]}}}\n  default: {arms: [kd-lora], teacher_of: teacher}\n"
        "  once: {arms: [fft], config: {run: {seeds: [0]}}}\n  by: {arms: [kd-lora], teacher_of: once}"
    )
    plan = SMALL.partition("settings:\n  default")[0].replace("settings: [default]", "settings: [teacher, default]")
    other = "  other: {teacher: big, student: little, sets: [mood], settings: [once, by]}\n"
    kept = "{first: [default/kd-lora, by/kd-lora], second: [teacher/fft, once/fft], share: true}"
    prepared = prepare(tmp_path, f"{plan}{other}settings:\n  {taught}\ncontrasts:\n  kept: {kept}\n")
    for name, arm, seeds in (
        ("small/mood/teacher", "fft", (0,)),
        ("small/mood/default", "kd-lora", (0, 1, 2)),
        ("other/mood/once", "fft", (0,)),
        ("other/mood/by", "kd-lora", (0, 1, 2)),
    ):
        place = prepared / "runs" / name
        make_experiment(place, arms=(arm,), seeds=seeds, test_split=True)
        place.with_suffix(".json").write_text('{"finished": true, "seconds": 9, "shipped": ["kd-lora", 0]}')
    capsys.readouterr()
    options = read_options(["report", f"--out={prepared}", "--draws=200"])
    assert options.action(options) == 0
    told = capsys.readouterr().out
    assert re.search(r"\| mood \| .* \| 9\d\.\d% \([89]\d\.\d to [ 19]\d{1,2}\.\d\) of teacher: `fft` \|", told), told
    assert re.search(r"\nkept, mean of all pairs: 9\d\.\d% \([89]\d\.\d to [ 19]\d{1,2}\.\d\), 2 sets\.", told), told
    assert "n = 1" not in told
    options = read_options(["keep", f"--out={prepared}", f"--to={tmp_path / 'kept'}"])
    assert options.action(options) == 0
    shutil.rmtree(prepared)
    options = read_options(["report", f"--out={tmp_path / 'kept'}", "--draws=200"])
    assert options.action(options) == 0
    assert capsys.readouterr().out == told, "a table must not need what was not kept"


def test_a_further_pass_begins_with_the_student_that_it_names(tmp_path):
    """From the pretrained encoder, a second pass over hard texts would be a first one over few texts."""
    text = PLAN.with_name("hard.yaml").read_text(encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(text)
    plan = read_plan(tmp_path / "plan.yaml")
    begins = {job.settings: configure(plan, job, tmp_path, tmp_path).student.model for job in plan_jobs(plan)}
    assert Path(begins["hard"]).parts[-4:] == ("bank", "banking77", "once", "student")
    assert Path(begins["once"]) == tmp_path / "bert-tiny"
    (tmp_path / "plan.yaml").write_text(text.replace("student_of: once", "student_of: twice"))
    with pytest.raises(SystemExit, match="not declared: twice"):
        read_plan(tmp_path / "plan.yaml")


def test_prepare_writes_what_a_stranger_has(tmp_path):
    """Rows lost to a quote, classes out of proportion, or a review on both sides of a split would bend every score."""
    write_sources(tmp_path)
    prepared = prepare(tmp_path)
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
    tail = [row["mood"] for row in read_rows(prepared / "data/tail/train.csv")]
    assert sorted(map(tail.count, ("negative", "positive"))) == [3, 40], "one class in full, the other as declared"
    long = read_rows(prepared / "data/long/train.csv")
    assert [row["mood"] for row in long].count("positive") == 4
    assert all(row["text"].count(",\n") == 10 for row in long)
    mixed, few = (
        [json.loads(line) for line in (prepared / f"data/{name}/train.jsonl").read_text("utf-8").splitlines()]
        for name in ("mixed", "few")
    )
    assert len(mixed) == len(few) == 80
    assert {len(row["moods"]) for row in mixed} == {1, 2}
    assert {tuple(row["moods"]) for row in few} == {(), ("positive",)}
    assert all((", and " in row["text"]) or len(row["moods"]) == 1 for row in mixed)

    # Contrasts chosen after the figures are known are no longer declared.
    (prepared / "runs").mkdir()
    with pytest.raises(SystemExit, match="another plan"):
        prepare(tmp_path, SMALL.replace("seeds: [0]", "seeds: [7]"))
