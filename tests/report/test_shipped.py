"""The part of the report on what was shipped, and experiments beside each other."""

import json
import re
import shutil
from dataclasses import replace
from html import unescape
from pathlib import Path

import pytest

import fabricate
from experiments import edit_json
from fabricate import PAIRS, SIMILARITY, TOPICS, edit_record, make_experiment, ship
from kdlora.errors import ArtifactError
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.report.compare import compare
from kdlora.report.report import Report, make_report


@pytest.fixture
def layout(tmp_path: Path) -> ExperimentLayout:
    return make_experiment(tmp_path / "reviews", arms=("fft", "kd-lora"), seeds=(0,), rows=40)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report of an experiment whose every export passed."""
    folder = tmp_path_factory.mktemp("shipped") / "reviews"
    whole = make_experiment(folder, arms=("fft", "kd-lora"), seeds=(0,), rows=40)
    ship(whole)
    return _report(whole)


def _report(layout: ExperimentLayout) -> Report:
    return make_report(layout.root, draws=50)


def _rows(report: Report) -> dict[str, list[str]]:
    """Give the rows of all tables by their first cell, without links and emphasis."""
    lines = [line for line in report.markdown.splitlines() if line.startswith("| ")]
    plain = [re.sub(r"^\| \[(.*?)\]\S*", r"| \1", line).replace("\u00a0", " ").replace("**", "") for line in lines]
    cells = [line.strip("| ").split(" | ") for line in plain]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.drawn
def test_each_model_stands_beside_the_teacher(report):
    """A speed-up upside down, or against the student, still looks like one; the int8 file is what a reader came for."""
    row = _rows(report)["student, int8"]
    assert row[:4] == ["ONNX Runtime", "int8", "3.20 ms", "5.12 ms"]
    assert row[4:] == ["28.8×", "640", "32", "30.5×", "0.27 s", "61.0 MB", "23.0 MB", "91.05"]
    assert _rows(report)["teacher"][4] == "1.0×"
    assert "1,043 texts of the validation split, 3 rounds, 2 threads for each model, Intel Xeon, 2 cores" in report.html
    assert 'href="benchmark.json"' in report.html


def test_a_quantisation_that_failed_is_shown_as_failed(layout):
    """An int8 file that is missing without a word looks like one that nobody asked for."""
    ship(layout, int8=False)
    report = _report(layout)
    assert "The export failed before its last stage" in report.html
    row = _rows(report)["quantised: int8 weights per channel"]
    assert row[:3] == ["ONNX, optimised", "failed", "1,243"]
    assert row[3:] == ["0.41", "97.31%", "95.31% (1,043 rows)", "90.38", "+0.82", "+0.52 to +1.12"]
    assert (
        "**failed**, 97.31% of predictions agree, fewer than 99.00%; the score falls by 0.82 points" in report.markdown
    )
    assert "int8 file" not in report.markdown


@pytest.mark.drawn
def test_the_recipe_that_passed_follows_those_that_failed(report):
    """Which remedy was needed is what the next reader wants to know; 99.996% is not all."""
    stages = [line.split("]")[0] for line in report.markdown.splitlines() if "kdlora_export.json" in line]
    assert [stage.removeprefix("| [") for stage in stages] == [
        "ONNX, as captured",
        "ONNX, optimised",
        "quantised: int8 weights per channel",
        "quantised: uint8 weights, embeddings left in fp32",
    ]
    rows = _rows(report)
    assert rows["quantised: uint8 weights, embeddings left in fp32"][4] == "99.99%"
    assert rows["ONNX, as captured"][4:6] == ["100%", "–"]
    assert "Quantisation: uint8 weights, embeddings left in fp32. Fused operators: 6 Attention, 13 Layer" in report.html
    assert "The export failed" not in report.html


def test_calibration_stands_with_both_errors(layout):
    """A temperature without the error that it removes cannot be judged; nor one without a benchmark."""
    ship(layout, calibrated=True)
    edit_json(layout.benchmark, models=[])
    text = _report(layout).markdown
    assert "| before | 1 | 8.71% | 0.4120 |" in text
    assert "| after | **1.730** | **1.94%** | **0.3050** |" in text
    assert "Fitted on 400 rows of the validation split" in text
    assert "These figures are without the temperature, by which the shipped student answers." in text
    assert "measured side by side" not in text
    assert "int8 file" not in text


def test_what_was_not_shipped_is_said_and_a_page_is_linked(layout):
    """An empty heading is a promise; a missing extra must not look like a finished deployment; nobody finds a page."""
    assert "As shipped" not in _report(layout).markdown
    ship(layout)
    layout.export_record.unlink()
    html = _report(layout).html
    assert "The student was not exported to ONNX" in html
    assert "http.server" not in html
    layout.page.mkdir()
    (layout.page / "index.html").touch()
    html = _report(layout).html
    assert 'href="page/index.html"' in html
    assert "python -m http.server --bind 127.0.0.1 -d page" in html


@pytest.mark.parametrize(
    ("name", "content", "fault", "kept"),
    [
        ("benchmark", "", "benchmark.json is damaged: expected a JSON file", "The export, stage by stage"),
        ("benchmark", '{"calibration": {"temperature": NaN}}', "'calibration.temperature'", "stage by stage"),
        ("export_record", '{"stages": [{"stage": 1}]}', "kdlora_export.json: not the figures", "measured side by side"),
        ("export_record", None, "kdlora_export.json is damaged", "measured side by side"),
    ],
)
def test_a_damaged_file_costs_its_part_only(layout, name, content, fault, kept):
    """A report that cannot be made at the end of a long experiment, or figures that vanish without a word."""
    ship(layout)
    place = getattr(layout, name)
    place.unlink()
    place.mkdir() if content is None else place.write_text(content, encoding="utf-8")
    html = unescape(_report(layout).html)
    for told in (fault, kept, "Delete .deployed in the experiment's folder"):
        assert told in html
    for never in ("not exported to ONNX", str(layout.root)):
        assert never not in html


def test_missing_figures_leave_dashes(layout):
    """What a system cannot tell is not zero; a point without score has no place in a plot."""
    ship(layout)
    models = json.loads(layout.benchmark.read_text(encoding="utf-8"))["models"]
    blank = [model | {"score": None, "peak_memory_bytes": None, "p50_ms": 0} for model in models]
    layout.benchmark.write_text(json.dumps({"models": blank}), encoding="utf-8")
    report = _report(layout)
    row = _rows(report)["student, int8"]
    assert [row[place] for place in (4, 9, 11)] == ["–", "–", "–"]
    assert "The conditions were not recorded" in report.html


def test_experiments_stand_in_one_table_paired_with_what_the_first_shipped(tmp_path, monkeypatch):
    """Unpaired, a real difference drowns in the noise of rows; an arm that did not ship says nothing of what did."""
    monkeypatch.setitem(fabricate._NOISE, "kd-fft", 0.44)
    for name in ("one", "two"):
        make_experiment(tmp_path / name, arms=("fft", "kd-lora", "kd-fft"))
    for seed in range(3):  # the second experiment's student is as good as the teacher
        source, target = (tmp_path / name / "runs" for name in ("one", "two"))
        shutil.copy(source / f"fft-seed{seed}" / "predictions.parquet", target / f"kd-fft-seed{seed}")
    monkeypatch.setenv("HOME", str(tmp_path))
    report = compare(["~/one", tmp_path / "two"], out="~/both", draws=300)
    rows = _rows(report)
    assert report.markdown.split("\n\n")[1].startswith("**one: KD-FFT** scores highest of 4 comparable students")
    assert rows["one: KD-FFT"][2] == "reference"
    assert rows["two: KD-FFT"][2].startswith("+")
    assert " to " in rows["two: KD-FFT"][3]
    assert rows["one: FFT"][2:4] == rows["two: FFT"][2:4]
    assert report.paths == (tmp_path / "both" / "compare.md", tmp_path / "both" / "compare.html")
    assert report.paths[1].read_text(encoding="utf-8") == report.html
    assert "Score against parameters" in report.html


@pytest.mark.drawn
def test_scores_are_drawn_over_the_texts_that_were_labelled(tmp_path):
    """Whether asking is worth more than labelling by hand: copies of labelled rows would count as asked ones."""
    for name, asked, alpha in (("few", 0, 0.5), ("many", 8000, 0.5), ("alone", 2000, 0.0)):
        layout = make_experiment(tmp_path / name, seeds=(0,), arms=("fft", "kd-lora", "student-lora"))
        for place in layout.runs.glob("*/run.json"):
            rows = read_record(place).rows
            config = {"distil": {"alpha": alpha}}
            edit_record(place, rows=rows | {"unlabelled": asked, "copies": 2 * rows["train"]}, config=config)
    html = compare([tmp_path / name for name in ("few", "many", "alone")], out=tmp_path, draws=50).html
    told = re.search(r"score on validation by texts that were labelled[^<]*", html)[0]
    assert re.findall(r"[\w -]+(?:, no labels)? ends at", told) == [
        " KD-LoRA ends at",
        " student LoRA ends at",
        " KD-LoRA, no labels ends at",
    ]
    figure = html[html.index("Score against texts") :]
    assert {"5000", "10000"} <= set(re.findall(r">(\d+)</text>", figure))
    assert "Score against texts" not in compare([tmp_path / "few"], draws=50).html
    topics = replace(TOPICS, metrics=("accuracy",))  # another task of as few rows
    other = make_experiment(tmp_path / "topics", task=topics, seeds=(0,), arms=("fft", "kd-lora"))
    edit_record(other.run("kd-lora", 0).record, rows={"train": 900, "validation": 400})
    assert "Score against texts" not in compare([tmp_path / "few", other.root], draws=50).html


def test_times_with_other_threads_are_not_drawn_side_by_side(tmp_path):
    """A student with 16 threads stood as the fastest beside one with 2, on the same plot."""
    layout = make_experiment(tmp_path / "one", arms=("kd-lora", "student-lora"), seeds=(0,))
    places = [layout.run(arm, 0) for arm in ("kd-lora", "student-lora")]
    alike = compare([place.root for place in places], draws=50)
    slow = read_record(places[0].record).latency
    edit_record(places[1].record, latency=[one.model_copy(update={"threads": 16}) for one in slow])
    unlike = compare([place.root for place in places], draws=50)
    for report, told in ((alike, False), (unlike, True)):
        assert ("Times and memory are of several machines or numbers of threads" in report.markdown) == told
        assert ("Score against latency" in report.html) != told
        assert "Score against parameters" in report.html


def test_single_runs_are_compared(tmp_path):
    """A user who wants to ship one seed compares that seed, not the mean."""
    layout = make_experiment(tmp_path / "one")
    places = [layout.run("kd-lora", 0), layout.run("student-lora", 1)]
    report = compare([place.root for place in places], draws=300)
    rows = _rows(report)
    for place in places:
        score = read_record(place.record).score
        assert rows[f"one: {place.root.name}"][1].startswith(f"[{score:.1f}]")
    assert report.paths == ()


def test_other_tasks_and_other_rows_are_not_paired(tmp_path):
    """A difference between Pearson and accuracy, or between other examples; F1 of spam was compared as F1 of ham."""
    make_experiment(tmp_path / "one", task=PAIRS, arms=("kd-lora",))
    make_experiment(tmp_path / "two", task=PAIRS, arms=("kd-lora",), rows=300)
    make_experiment(tmp_path / "three", task=SIMILARITY, arms=("kd-lora",))
    make_experiment(tmp_path / "four", task=PAIRS, arms=("kd-lora",), test_split=True)
    make_experiment(tmp_path / "five", task=replace(PAIRS, label_names=PAIRS.label_names[::-1]), arms=("kd-lora",))
    make_experiment(tmp_path / "six", task=replace(PAIRS, metrics=("macro_f1",)), arms=("kd-lora",))
    names = ("one", "two", "three", "four", "five", "six")
    report = compare([tmp_path / name for name in names], draws=300)
    rows = _rows(report)
    assert rows["two: KD-LoRA"][3] == "not paired: the examples are not the same"
    for other in ("three", "five"):
        assert rows[f"{other}: KD-LoRA"][2:4] == ["–", "another task or order of labels"]
    assert rows["four: KD-LoRA"][2:4] == ["–", "scored on test"]
    assert rows["six: KD-LoRA"][3].startswith("scored by ")


def test_what_is_in_the_place_of_a_page_is_named(tmp_path):
    """A file that was named as the folder was a failure of the program, "[Errno 17] File exists"."""
    make_experiment(tmp_path / "one", arms=("kd-lora",))
    (tmp_path / "a.csv").touch()
    (tmp_path / "b" / "compare.md").mkdir(parents=True)
    for out in ("a.csv", "a.csv/x", "b"):
        with pytest.raises(ArtifactError, match=r"a\.csv is no folder; name one|compare\.md is a folder, in the place"):
            compare([tmp_path / "one"], out=tmp_path / out)


def test_seeds_that_nobody_shares_are_not_paired(tmp_path):
    """Seeds 3 and 4 were set against 0 and 1 of three, "on the seeds that both have"."""
    for name, seeds in (("one", (0, 1, 2)), ("two", (3, 4))):
        make_experiment(tmp_path / name, arms=("kd-lora",), seeds=seeds)
    report = compare([tmp_path / "one", tmp_path / "two"], draws=300)
    assert _rows(report)["two: KD-LoRA"][3] == "not paired: no seed in common"
    assert "seeds that both have" not in report.markdown


def test_a_lead_tells_ties_and_seeds_that_are_not_shared(tmp_path):
    """The first of four equal students scored "highest"; +11.0 stood beside scores that are 10.5 apart."""
    make_experiment(tmp_path / "one", arms=("kd-lora",), seeds=(0,))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert re.search(r"highest of 2 comparable students \([\d.]+, as 1 more\)", _lead_of(tmp_path, "one", "two"))
    make_experiment(tmp_path / "many", arms=("kd-fft",), seeds=(0, 1, 2))
    assert "on the seeds that both have" in _lead_of(tmp_path, "many", "one")


def _lead_of(folder: Path, *names: str) -> str:
    return compare([folder / name for name in names], draws=50).markdown.split("##")[0].replace("**", "")


def test_failed_runs_are_named_and_nothing_finished_is_said(tmp_path):
    """A row that is missing without a word."""
    make_experiment(tmp_path / "one", arms=("kd-lora",), failed=[("kd-lora", 1)])
    assert "one, KD-LoRA, seed 1: failed" in compare([tmp_path / "one"], draws=100).markdown
    make_experiment(tmp_path / "two", arms=("kd-lora",), seeds=(0,), failed=[("kd-lora", 0)])
    assert "no run has finished" in compare([tmp_path / "two"], draws=100).markdown
