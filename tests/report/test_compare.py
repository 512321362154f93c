import re
import shutil

import pytest

from fabricate import PAIRS, SIMILARITY, edit_record, make_experiment
from kdlora.evidence.records import read_record
from kdlora.report.compare import compare


def _rows(markdown: str) -> dict[str, list[str]]:
    lines = [
        line.strip("| ").replace("\u00a0", " ").replace("**", "") for line in markdown.splitlines() if line[:2] == "| "
    ]
    cells = [line.split(" | ") for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_experiments_stand_in_one_table_paired_with_the_first_student(tmp_path):
    """Two experiments on the same rows must be paired, or a real difference drowns in the noise of the rows."""
    for name in ("one", "two"):
        make_experiment(tmp_path / name, arms=("fft", "kd-lora"))
    for seed in range(3):  # the second experiment's student is as good as the teacher
        source, target = (tmp_path / name / "runs" for name in ("one", "two"))
        shutil.copy(source / f"fft-seed{seed}" / "predictions.parquet", target / f"kd-lora-seed{seed}")
    report = compare([tmp_path / "one", tmp_path / "two"], out=tmp_path / "both", draws=300)
    rows = _rows(report.markdown)
    assert rows["one: KD-LoRA"][2] == "reference"
    assert rows["two: KD-LoRA"][2].startswith("+")
    assert " to " in rows["two: KD-LoRA"][3]
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
            config = {"distil": {"alpha": alpha}, "data": {"augment": 2}}
            edit_record(place, rows=rows | {"unlabelled": asked + 2 * rows["train"]}, config=config)
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


def test_single_runs_are_compared(tmp_path):
    """A user who wants to ship one seed compares that seed, not the mean."""
    layout = make_experiment(tmp_path / "one")
    places = [layout.run("kd-lora", 0), layout.run("student-lora", 1)]
    report = compare([place.root for place in places], draws=300)
    rows = _rows(report.markdown)
    for place in places:
        score = read_record(place.record).score
        assert rows[f"one: {place.root.name}"][1].startswith(f"[{score:.1f}]")
    assert report.paths == ()


def test_other_tasks_and_other_rows_are_not_paired(tmp_path):
    """A difference between Pearson and accuracy, or between other examples, has no meaning."""
    make_experiment(tmp_path / "one", task=PAIRS, arms=("kd-lora",))
    make_experiment(tmp_path / "two", task=PAIRS, arms=("kd-lora",), rows=300)
    make_experiment(tmp_path / "three", task=SIMILARITY, arms=("kd-lora",))
    make_experiment(tmp_path / "four", task=PAIRS, arms=("kd-lora",), test_split=True)
    names = ("one", "two", "three", "four")
    report = compare([tmp_path / name for name in names], draws=300)
    rows = _rows(report.markdown)
    assert rows["two: KD-LoRA"][3] == "not paired: the examples are not the same"
    assert rows["three: KD-LoRA"][2:4] == ["–", "another task"]
    assert rows["four: KD-LoRA"][2:4] == ["–", "scored on test"]


def test_failed_runs_are_named_and_nothing_finished_is_said(tmp_path):
    """A row that is missing without a word."""
    make_experiment(tmp_path / "one", arms=("kd-lora",), failed=[("kd-lora", 1)])
    assert "one, KD-LoRA, seed 1: failed" in compare([tmp_path / "one"], draws=100).markdown
    make_experiment(tmp_path / "two", arms=("kd-lora",), seeds=(0,), failed=[("kd-lora", 0)])
    assert "no run has finished" in compare([tmp_path / "two"], draws=100).markdown
