"""The tables of a suite, from records whose figures are known."""

import re
import statistics

import numpy as np
import pytest

from experiments import read_rows
from fabricate import make_record
from kdlora.data.tasks import GLUE
from kdlora.evidence.predictions import Predictions, write_predictions
from kdlora.experiment.plan import make_plan
from kdlora.experiment.suite_tables import SuiteFigures, settings_text, write_tables
from kdlora.experiment.suitefile import build_suite
from kdlora.report.page import Cell, Table, to_csv, to_latex

BASE = {"fft": 85.0, "lora": 84.0, "kd-lora": 82.0, "student-lora": 81.5}


def small_plan(**changes):
    values = {
        "name": "tables",
        "tasks": ["cola", "mnli"],
        "families": {"bert": {"family": "bert"}, "own": {"teacher": {"model": "t"}, "student": {"model": "s"}}},
        "config": {"data": {"path": "x/y"}},
        "seeds": [0, 1],
        "best": 2,
        "grids": {"fft": {"teacher.train.epochs": [2, 3, 4]}, "adapters": {"lora.rank": [8, 16, 32]}},
    }
    return make_plan(build_suite(values | changes))


def record(run, points, **changes):
    task = GLUE[run.task].task
    metrics = {task.metrics[0]: points / 100}
    if run.task == "mnli":
        metrics |= {"accuracy_matched": (points - 1) / 100, "accuracy_mismatched": (points + 1) / 100}
    values = {"model": "bert_base & <co>", "metrics": metrics, "trainable_parameters": 1000 * run.config.lora.rank}
    return make_record(run.arm, run.seed, task=task, value=points).model_copy(update=values | changes)


def made(plan):
    """Configuration k (from 0) of an arm scores its base + 2k, seeds 0.5 apart."""
    found = {}
    for runs in plan.cells.values():
        folders = list(dict.fromkeys(run.folder for run in runs))
        for run in runs:
            found[run.key] = record(run, BASE[run.arm] + 2 * folders.index(run.folder) + 0.5 * run.seed)
    return found


@pytest.fixture
def write(tmp_path):
    """`write(plan, records)` writes the tables, and gives the page as Markdown."""

    def give(plan, records):
        write_tables(plan, tmp_path, records)
        return (tmp_path / "suite.md").read_text(encoding="utf-8")

    return give


@pytest.fixture
def figures(tmp_path):
    """Those of the whole plan."""
    plan = small_plan()
    return SuiteFigures(plan, made(plan), tmp_path)


def test_a_figure_is_the_median_of_the_best_configurations(figures):
    """A mean over the whole grid, or over seeds as if they were configurations, is another number than the paper's."""
    found = figures.scores[figures.rows[0], "own", "lora"]
    assert found.median == pytest.approx(statistics.median([86.25, 88.25]))
    assert [value for _, value in found.taken] == [88.0, 88.5, 86.0, 86.5]
    assert found.sd == pytest.approx(statistics.stdev([88.0, 88.5, 86.0, 86.5]))
    assert (found.configurations, found.failed, found.missing) == (3, 0, 0)

    # Ten rows are nine trainings; the mean of matched and mismatched in both rows would look right.
    assert [row.title for row in figures.rows] == ["CoLA", "MNLI-m", "MNLI-mm"]
    matched, other = (figures.median(row, "own", "fft") for row in figures.rows[1:])
    assert (matched, other) == (pytest.approx(88.25 - 1), pytest.approx(88.25 + 1))


def test_rows_and_configurations_have_names_of_their_own(tmp_path):
    """Two sizes of one GLUE task were two rows "SST-2", and the two dropouts of a grid both "dropout"."""
    tasks = {f"cola-{rows}": {"task": {"name": "cola"}, "data": {"max_train_examples": rows}} for rows in (100, 1000)}
    grids = {"adapters": [{"lora.alpha": [16.0]}, {"distil.alpha": [0.3]}, {"lora.rank": [8]}]}
    plan = small_plan(tasks=tasks, grids=grids, arms=["fft", "kd-lora"])
    made = {run.key: make_record(run.arm, run.seed, task=GLUE["cola"].task, value=50.0) for run in plan.runs()}
    assert [row.title for row in SuiteFigures(plan, made, tmp_path).rows] == ["cola-100", "cola-1000"]
    told = settings_text(next(run for run in plan.runs() if run.arm == "kd-lora"))
    assert told == "lora.alpha 16.0, distil.alpha 0.3, rank 8"


def test_with_a_test_split_the_choice_stays_on_validation(tmp_path):
    """Configurations that are chosen on the test split make its figure too high."""
    plan = small_plan(seeds=[0], best=1)
    cell = plan.cells["cola", "own", "fft"]
    scores = [(90.0, 70.0), (80.0, 95.0), (70.0, 60.0)]
    records = {
        run.key: record(run, validation, test_score=test) for run, (validation, test) in zip(cell, scores, strict=True)
    }
    figures = SuiteFigures(plan, records, tmp_path)
    assert figures.median(figures.rows[0], "own", "fft") == 70.0


def test_the_gain_is_on_the_split_of_the_table_above_it(write, tmp_path):
    """A student that loses on the test rows above was told to gain: the line below spoke of validation rows."""
    families = {"own": {"teacher": {"model": "t"}, "student": {"model": "s"}}}
    plan = small_plan(tasks=["sst2", "rte"], families=families, seeds=[0], grids={})
    scores = {"kd-lora": (90.0, 70.0), "student-lora": (80.0, 75.0)}
    records = {}
    for run in plan.runs():
        validation, test = scores.get(run.arm, (90.0, 90.0))
        records[run.key] = record(run, validation, test_score=test if run.task == "sst2" else None)
    keep_predictions(plan, tmp_path, records)
    figures = SuiteFigures(plan, records, tmp_path)
    found, _ = figures.gain(figures.rows[0], "own", "kd-lora")
    assert (found.plain, found.difference.n_examples) == (-5, 1000)
    assert found.difference.low < -5 < found.difference.high
    assert "Scored on test (SST-2) and validation (RTE)." in write(plan, records)
    lines = read_rows(tmp_path / "table1.csv")
    assert {(line["task"], line["split"]) for line in lines} == {("sst2", "test"), ("rte", "validation")}


def test_the_gain_is_paired_by_configuration_and_seed(figures):
    """The best of one arm against the best of another says nothing of the teacher if they are other configurations."""
    row = figures.rows[0]
    found, pairs = figures.gain(row, "own", "kd-lora")
    assert (found.plain, pairs) == (pytest.approx(0.5), 6)
    assert found.difference is None  # there are no predictions
    del figures.records[figures.plan.cells["cola", "own", "kd-lora"][0].key]
    assert figures.gain(row, "own", "kd-lora")[1] == 5


def keep_predictions(plan, root, records, rows=1000):
    """Predictions that are right for the share of rows that the record's scores say, of both of MNLI's groups."""
    for run in plan.runs():
        task, one = GLUE[run.task].task, records[run.key]
        scores = {"validation": one.score} | ({} if one.test_score is None else {"test": one.test_score})
        right = np.concatenate([np.arange(rows) < 10 * score for score in scores.values()])
        labels = np.arange(len(right)) % task.num_labels
        kept = Predictions(
            ids=tuple(map(str, range(rows))) * len(scores),
            split=tuple(np.repeat(list(scores), rows)),
            logits=np.eye(task.num_labels)[np.where(right, labels, (labels + 1) % task.num_labels)],
            label_names=task.label_names,
            labels=labels,
            groups=("matched", "mismatched") * (len(right) // 2) if run.task == "mnli" else None,
        )
        write_predictions(run.layout(root).run(run.arm, run.seed).predictions, kept)


def test_the_interval_of_a_gain_speaks_of_rows_and_seeds(write, tmp_path):
    """Six runs of two seeds are two seeds; one seed gives no verdict, however many configurations it ran."""
    plan = small_plan(tasks=["mnli"])
    records = made(plan)
    keep_predictions(plan, tmp_path, records)
    figures = SuiteFigures(plan, records, tmp_path)
    for row in figures.rows:
        found = figures.gain(row, "own", "kd-lora")[0].difference
        assert found.n_seeds == 2
        assert found.n_examples == 500  # of the row's own group
        assert found.low < found.difference < found.high
    assert "no verdict)" not in write(plan, records)

    # Where runs were to come, the points were a mean over the pairs, beside an interval around that over the seeds.
    cell = [run for run in plan.cells["mnli", "own", "kd-lora"] if run.seed == 1]
    records |= {run.key: record(run, records[run.key].score + 3) for run in cell}
    keep_predictions(plan, tmp_path, records)
    del records[cell[0].key]
    found, pairs = figures.gain(figures.rows[0], "own", "kd-lora")
    assert (pairs, found.plain) == (5, pytest.approx(2.0))
    assert found.plain == pytest.approx((found.difference.low + found.difference.high) / 2)
    plan = small_plan(tasks=["mnli"], seeds=[0])
    records = made(plan)
    keep_predictions(plan, tmp_path, records)
    assert "(one seed: no verdict)" in write(plan, records)


def test_the_headline_is_not_ruled_by_a_row_where_the_teacher_learnt_nothing(write, tmp_path):
    """A student with 20 where its teacher has 10 "keeps 200%": as a mean of ratios, that hid a real loss elsewhere."""
    plan = small_plan(families={"own": {"teacher": {"model": "t"}, "student": {"model": "s"}}}, tasks=["cola", "sst2"])
    scores = {("cola", "fft"): 10.0, ("cola", "kd-lora"): 20.0, ("sst2", "fft"): 90.0, ("sst2", "kd-lora"): 70.0}
    lead = write(plan, {run.key: record(run, scores.get((run.task, run.arm), 50.0)) for run in plan.runs()})
    assert (
        "KD-LoRA scores **90.0%** of what the arm of its teachers does (45.0 of 50.0, means of the rows below" in lead
    )

    # Matthews of a model that learnt nothing is often a hair below zero, and stood in the table as -0.0.
    markdown = write(plan, {run.key: record(run, -0.02) for run in plan.runs()})
    assert not re.search(r"[-−]0\.0(?!\d)", markdown + (tmp_path / "table1.tex").read_text(encoding="utf-8"))


def test_what_failed_or_is_missing_is_said_in_the_cell(figures, write, tmp_path):
    """A median of what happened to survive must not look like a full cell."""
    second, first = figures.plan.cells["cola", "own", "lora"][-2:]
    failed = record(first, 1.0, status="failed", error="=<script>|boom|", score=None, metrics={})
    records = {key: one for key, one in figures.records.items() if key != second.key} | {first.key: failed}
    markdown = write(figures.plan, records)
    assert "1 failed, 1 to come)" in markdown
    lines = read_rows(tmp_path / "runs.csv")
    assert sorted({line["status"] for line in lines}) == ["failed", "finished", "to come"]
    failed = next(line for line in lines if line["status"] == "failed")
    assert failed["error"] == "'=<script>|boom|"

    # Two families of a task could not be told apart, and no program could draw score against rank or time.
    assert (failed["family"], failed["rank"], failed["model"]) == (
        "own",
        str(first.config.lora.rank),
        "bert_base & <co>",
    )
    (cell,) = [
        line for line in lines if line["record"] == f"{figures.plan.cells['cola', 'own', 'fft'][0].key}/run.json"
    ]
    assert (cell["rank"], cell["score"]) == ("", "85.0")
    assert float(cell["latency_ms_batch_1"]) < float(cell["latency_ms_batch_32"])


def test_the_papers_figures_stand_beside_ours_where_they_belong(figures, write, tmp_path):
    """Figures of BERT beside another family's would compare what cannot be compared."""
    markdown = write(figures.plan, figures.records)
    lines = read_rows(tmp_path / "table1.csv")
    paper = {(line["row"], line["family"], line["arm"]): line["paper"] for line in lines}
    assert paper["CoLA", "bert", "kd-lora"] == "56.3"
    assert paper["MNLI-mm", "bert", "lora"] == "83.9"
    assert paper["CoLA", "bert", "student-lora"] == ""
    assert paper["CoLA", "own", "kd-lora"] == ""
    assert {line["n"] for line in lines} == {"4"}
    mean = statistics.mean([56.3, 82.0, 82.4])
    score = next(line for line in markdown.splitlines() if line.startswith("| paper, the same rows"))
    assert f"{mean:.1f}" in score

    # A suite that went on elsewhere put the times of two machines into one column without a word.
    elsewhere = figures.plan.cells["cola", "own", "kd-lora"][0].key
    records = figures.records | {elsewhere: figures.records[elsewhere].model_copy(update={"device": "cuda:0"})}
    told = ["Times and memory are of several machines" in page for page in (markdown, write(figures.plan, records))]
    assert told == [False, True]


def test_families_are_told_apart_whatever_they_share(write, tmp_path):
    """Two columns were headed "BERT: KD-LoRA", one with DistilBERT's figures below another student's.

    A run that both share had a line in runs.csv for the first alone, so a program found no teacher of the second.
    """
    plan = small_plan(families={"base": {"family": "bert"}, "tiny": {"family": "bert", "student": {"model": "other"}}})
    markdown = write(plan, made(plan))
    assert "base: KD-LoRA" in markdown
    assert "tiny: KD-LoRA" in markdown
    paper = {line["family"] for line in read_rows(tmp_path / "table1.csv") if line["paper"]}
    assert paper == {"base"}
    lines = read_rows(tmp_path / "runs.csv")
    assert {(line["family"], line["arm"]) for line in lines} == {(one, arm) for one in ("base", "tiny") for arm in BASE}
    assert len({line["record"] for line in lines}) == len(plan.runs()) < len(lines)


def test_tables_of_nothing_can_be_written(write):
    """Ctrl-C in the first minute must leave a page, not a traceback over the reason."""
    assert "0 of" in write(small_plan(), {})

    # A model's name can break a table, or run as a spreadsheet's formula.
    latex = to_latex(Table("", ("a_b", "%"), ((r"50% {x} \y", Cell("−2.0\u00a0±\u00a01")),)))
    assert r"a\_b & \% \\" in latex
    assert r"50\% \{x\} \textbackslash y & -2.0 ± 1 \\" in latex
    assert to_csv([["=1+1", "-x", -1.5, None, 'say "a, b"']]) == '\'=1+1,\'-x,-1.5,,"say ""a, b"""\n'
