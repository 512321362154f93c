"""The benchmark of a stranger's first run on CoNLL files: sentences stay whole, and what counts are entities."""

from __future__ import annotations

import shutil

import pytest
import strangers
from strangers_plan import plan_jobs
from strangers_report import collect
from test_strangers import call

from fabricate import ship
from kdlora.evidence.records import ExperimentLayout
from sentences import tagged_rows, write_conll

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
