import json
import re
import shutil
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise, product
from pathlib import Path
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from markdown_it import MarkdownIt
from sklearn.metrics import precision_recall_fscore_support

import fabricate
from experiments import edit_json
from fabricate import ARMS, BINARY, MNLI, PAIRS, SIMILARITY, TAGS, edit_record, make_experiment, ship
from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError
from kdlora.evidence.predictions import read_predictions, write_predictions
from kdlora.evidence.records import Asked, read_record
from kdlora.report.collect import load_experiment
from kdlora.report.compare import compare
from kdlora.report.report import Report, make_report
from kdlora.report.tables import arm_table
from kdlora.system.integrity import seal

HOSTILE = (
    "<script>alert(1)</script>",
    "a|b\nc",
    "../../x",
    '"><img src=x onerror=alert(2)>',
    "`*_[x](javascript:alert(3))",
)
FETCHED = {"src", "href", "data", "srcset"}
SCRIPT = files("kdlora.report").joinpath("templates/report.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """An experiment of four arms and three seeds, and its report; read only."""
    layout = make_experiment(tmp_path_factory.mktemp("experiments") / "reviews")
    return layout, _report(layout.root)


INTENTS = Task("single-label", ("text",), ("label",), tuple(f"intent {n}" for n in range(30)), ("accuracy",))


def _report(folder: Path) -> Report:
    return make_report(folder, draws=200)


def _opening(report: Report) -> str:
    """The first sentence of the Markdown, its emphasis removed."""
    return report.markdown.split("\n\n")[1].replace("**", "").replace("\u00a0", " ")


def _plain(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", html)).replace("\u00a0", " ")


def _check(html: str) -> list[tuple[str, dict[str, str]]]:
    """Give the elements of a page, with their attributes; what is opened must be closed, and nothing be fetched."""
    assert not re.search(r"@import|url\((?!data:|#)", html)
    whole = re.sub(r"<((?:meta|link) [^>]*)>", r"<\1/>", html.replace(SCRIPT, ""))
    page = ElementTree.fromstring(whole.partition("<!DOCTYPE html>")[2])
    found = [(one.tag.rpartition("}")[2], one.attrib) for one in page.iter()]
    assert all(own.get("scope") in ("col", "row") for tag, own in found if tag == "th"), "a screen reader needs scopes"
    tags = [tag for tag, _ in found]
    assert tags.count("caption") == tags.count("table")
    outside = [value for tag, own in found for name, value in own.items() if name in FETCHED and tag != "a"]
    assert all(value.startswith("data:") for value in outside), "what is loaded from elsewhere fails on the train"
    return found


def test_it_opens_with_the_answer_in_one_sentence(reviews):
    """A reader who stops after the first line must know whether the student is good enough."""
    layout, report = reviews
    opening = _opening(report)
    pattern = (
        r"The distilled student \(kd-lora\) was shipped: on validation it is better than the student without a teacher "
        r"\(student-lora\) by \d\.\d points \(95% interval \+\d\.\d to \+\d\.\d; n = 3\)\. "
        r"It keeps \d+\.\d ± \d\.\d% of bert-base-uncased’s score \(\d+\.\d ± \d\.\d of \d+\.\d ± \d\.\d; "
        r"accuracy on validation, 3 seeds\) with 39% fewer parameters and \d+% less time per text\. Distillation adds "
        r"\+\d\.\d points over the same student without a teacher \(95% interval \+\d\.\d to \+\d\.\d; n = 3\)\."
    )
    assert re.fullmatch(pattern, opening)
    assert opening in _plain(report.html)
    scores = {arm: [read_record(layout.run(arm, seed).record).score for seed in range(3)] for arm in ARMS}
    mean = {arm: sum(values) / 3 for arm, values in scores.items()}
    assert f"({mean['kd-lora']:.1f} ± " in opening
    assert f" of {mean['fft']:.1f} ± " in opening
    assert f"It keeps {sum(100 * score / mean['fft'] for score in scores['kd-lora']) / 3:.1f} ± " in opening
    assert f"Distillation adds +{mean['kd-lora'] - mean['student-lora']:.1f} points" in opening
    assert report.paths == (layout.report_md, layout.report_html)
    assert report.paths[0].read_text(encoding="utf-8") == report.markdown


def test_a_teacher_below_its_student_is_called_out(reviews, tmp_path, monkeypatch):
    """A share of 105% reads like success; it is a teacher that nobody trained to its end."""
    monkeypatch.setitem(fabricate._NOISE, "fft", 0.8)
    html = _report(make_experiment(tmp_path / "useful").root).html
    assert re.search(r"below LoRA with \d\d\.\d; even so, its student gains by it\.</p>", html)
    assert "longer training" not in html  # beside the gain it read as an error
    monkeypatch.setitem(fabricate._NOISE, "kd-lora", 0.55)
    report = _report(make_experiment(tmp_path / "weak").root)
    assert "It may need longer training" in report.html
    assert re.search(r"It scores \d\d\.\d ± \d\.\d against \d\d\.\d ± \d\.\d of bert-base", _opening(report))  # no 105%
    assert "may need longer training" not in reviews[1].html
    for place in (tmp_path / "weak").glob("runs/fft*/run.json"):
        config = read_record(place).config
        edit_record(place, config=config | {"teacher": {"probabilities": "asked/probabilities.parquet"}})
    given = _report(tmp_path / "weak")
    assert "longer training" not in given.html
    assert "FFT: the teacher, all weights tuned" in report.markdown
    assert "FFT: the teacher, as it was given" in given.markdown
    for place in (tmp_path / "weak").glob("runs/*/run.json"):
        edit_record(place, config={"teacher": {"tuning": "lora"}})
    told = _report(tmp_path / "weak").markdown
    assert "FFT: a model of the teacher's size, all weights tuned" in told
    assert "LoRA: the teacher, tuned by adapters" in told
    assert "below" not in _opening(reviews[1])


def test_a_better_student_without_a_teacher_ships_and_opens_the_report(tmp_path, monkeypatch):
    """A report that opens with what the distilled student keeps hides that it is the worst of the arms."""
    monkeypatch.setitem(fabricate._NOISE, "student-lora", 0.40)
    monkeypatch.setitem(fabricate._NOISE, "kd-lora", 0.6)
    opening = _opening(_report(make_experiment(tmp_path / "reviews", arms=(*ARMS, "kd-fft"), rows=800).root))
    pattern = (
        r"The student without a teacher \(student-lora\) was shipped: on validation it is better than the distilled "
        r"student \(kd-fft\) by \d\.\d points \(95% interval \+\d\.\d to \+\d\.\d; n = 3\).*"
        r"Distillation costs \d+\.\d points"
    )
    assert re.match(pattern, opening)


def test_the_opening_says_on_test_what_validation_chose(tmp_path, monkeypatch):
    """Validation's rows chose, so its difference is too large: once it was 15.9 points, on test 1.2."""
    monkeypatch.setitem(fabricate._NOISE, "kd-fft", 0.4)
    layout = make_experiment(tmp_path / "e", arms=(*ARMS, "kd-fft"), rows=300, test_split=True)
    report = _report(layout.root)
    chosen = (
        r"without a teacher \(student-lora\)( by \d+\.\d points)?\. On test kd-fft scores (\d+\.\d) points more than "
    )
    told = re.search(chosen + r"student-lora \(95% interval [^()]*\)\. It ", _opening(report))
    rows = {line.split(" | ")[0]: line for line in report.markdown.splitlines() if line.startswith("| KD")}
    assert f"[+{told[2]}]" in rows["| KD-FFT − student LoRA"]
    for noise in (0.4, 0.8):  # whichever of the two ships, the gain is the same pair
        monkeypatch.setitem(fabricate._NOISE, "kd-lora", noise)
        assert "On test" not in _opening(_report(make_experiment(tmp_path / f"{noise}", test_split=True).root))


def test_an_arm_that_is_neither_teacher_nor_student_is_shown_and_never_shipped(tmp_path, monkeypatch):
    """A bag of words may score best; it is no model that `student/` could hold."""
    monkeypatch.setitem(fabricate._NOISE, "words", 0.1)
    layout = make_experiment(tmp_path / "reviews", arms=(*ARMS, "words"), failed=[("words", 1), ("words", 2)])
    report = _report(layout.root)
    assert _opening(report).startswith("The distilled student (kd-lora) was shipped")
    row = next(line for line in report.markdown.splitlines() if line.startswith("| KD-LoRA − bag of words"))
    assert row.split("|")[-2].strip() == "3"  # one baseline beside every seed
    assert "may need no transformer" in report.markdown
    monkeypatch.setitem(fabricate._NOISE, "words", 0.46)  # not as good as the teacher, which needs its transformer
    told = _report(make_experiment(tmp_path / "between", arms=("fft", "kd-lora", "words"), seeds=(0,)).root).markdown
    assert "a transformer helps here" in told
    assert "need no transformer" not in told


@pytest.mark.parametrize(
    ("arms", "expected"),
    [
        (("fft", "kd-lora"), "What distillation adds is not known without a distilled student and its control"),
        (("kd-lora", "student-lora"), "accuracy on validation, 3 seeds; there is no score of a teacher)"),
        (("fft", "student-lora"), "What distillation adds is not known"),
        (("fft", "kd-lora", "student-fft"), "What distillation adds is not known"),
        (("student-fft",), "it is the only student with a score. It scores"),
        (("fft", "lora"), "There is no answer yet: no student run of reviews has finished (the teacher scores"),
    ],
)
def test_missing_arms_are_said_to_be_missing(tmp_path, arms, expected):
    """A figure made from nothing, or a crash at the end of a long experiment."""
    report = _report(make_experiment(tmp_path / "reviews", arms=arms).root)
    assert expected in _opening(report)
    _check(report.html)


def test_an_experiment_without_students_is_not_waited_for(tmp_path):
    """“No answer yet” of teachers that were measured by themselves, though nothing is missing."""
    layout = make_experiment(tmp_path / "teachers", arms=("fft", "lora"), seeds=(0,))
    for arm in ("fft", "lora"):
        edit_record(layout.run(arm, 0).record, config={"run": {"arms": ["fft", "lora"]}})
    told = _opening(_report(layout.root))
    assert re.match(r"teachers has no student, so .* teacher: .* scores \d\d\.\d, .* scores \d\d\.\d\. For a", told)
    assert "answer yet" not in told


def test_one_seed_gives_no_verdict(tmp_path):
    """A single seed, or the only one that did not fail, must not look like evidence."""
    failed = [(arm, seed) for arm in ARMS if arm != "fft" for seed in (1, 2)]
    report = _report(make_experiment(tmp_path / "reviews", failed=failed, rows=100).root)
    assert re.search(
        r"Distillation makes a difference of .\d\.\d points .*95% interval over rows .*; one seed: no v",
        _opening(report),
    )
    assert not re.search(" adds | costs | better ", _opening(report))
    assert "One seed: no verdict" in report.markdown
    assert "interval of the share" not in report.markdown


def test_a_failed_run_is_shown_as_failed_and_left_out_of_the_means(tmp_path):
    """A mean over the seeds that survived must say that some did not."""
    layout = make_experiment(tmp_path / "reviews", failed=[("kd-lora", 1), ("lora", 0), ("lora", 1), ("lora", 2)])
    report = _report(layout.root)
    assert "accuracy on validation, 2 seeds" in _opening(report)
    text = _plain(report.html)
    assert "KD-LoRA, seed 1 failed: ChildDiedError: the process that ran this was killed by SIGKILL" in text
    row = next(line for line in report.markdown.splitlines() if line.startswith("| **score**"))
    assert "failed" in row.split("|")[3]
    edit_record(layout.run("student-lora", 2).record, status="running", score=None)
    assert "student LoRA, seed 2 has not finished; the same command continues it" in _plain(_report(layout.root).html)


def test_no_gain_is_not_called_a_gain(reviews, tmp_path):
    """An interval around zero must not be sold as an improvement, nor one of a few rows as evidence."""
    layout = make_experiment(tmp_path / "reviews", rows=20)
    for seed in range(3):
        shutil.copy(layout.run("kd-lora", seed).predictions, layout.run("student-lora", seed).predictions)
    report = _report(layout.root)
    opening = _opening(report)
    assert "Distillation makes a difference of 0.0 points" in opening
    assert "it includes zero, so no gain is shown" in opening
    assert "Scores are of 20 rows" in report.markdown
    alone = make_experiment(tmp_path / "alone", rows=20, arms=("student-lora",))  # without a gain it was not said
    for seed in range(3):
        edit_record(alone.run("student-lora", seed).record, rows={"train": 100, "validation": 20})
    assert "Scores are of 20 rows" in _report(alone.root).markdown
    assert "Scores are of" not in reviews[1].markdown


def test_other_texts_of_the_same_ids_are_not_paired(tmp_path):
    """Row numbers are ids of any file: two test files were compared row by row, to an interval and a verdict."""
    one, same, other = (
        make_experiment(tmp_path / name, texts=[text]) for name, text in (("a", "dull"), ("b", "dull"), ("c", "fine"))
    )
    told = ["other texts of the same ids" in compare([one.root, two.root], draws=50).markdown for two in (same, other)]
    assert told == [False, True]
    # As where one experiment's texts were cleaned: the scores are of like tasks, and stand side by side.
    told = "scores highest of 4 students, 2 of them scored on other rows"
    assert told in compare([one.root, other.root], draws=50).markdown


def test_labels_by_the_teacher_make_no_student_without_one(reviews, tmp_path):
    """Where people labelled nothing, the control learns the language model's labels, and the gain is another one."""
    layout = make_experiment(tmp_path / "reviews", arms=("kd-lora", "student-lora"), seeds=(0,))
    told, asked = "The training labels are the language model’s own", Asked("m", 9, 9, 1.0, 16, None, own_labels=True)
    edit_record(layout.run("kd-lora", 0).record, asked=asked)
    assert told in _report(layout.root).markdown
    assert told not in reviews[1].markdown


def test_the_test_split_takes_the_headline(reviews, tmp_path):
    """A score that was selected on must not be the headline where a clean one exists."""
    report = _report(make_experiment(tmp_path / "reviews", test_split=True).root)
    assert "accuracy on test, 3 seeds" in _opening(report)
    assert "Scores are on the test split" in report.html
    assert "| 200 |" in report.markdown  # the differences are drawn from the 200 test rows
    assert "There is no test split" in reviews[1].html


def test_a_teacher_that_was_never_scored_hides_no_test_split(tmp_path):
    """A table of training rows made the report deny the test file, and call a file lost that nothing had written."""
    layout = make_experiment(tmp_path / "reviews", arms=("kd-lora", "fft", "student-lora"), seeds=(0,), test_split=True)
    layout.run("fft", 0).predictions.unlink()
    edit_record(layout.run("fft", 0).record, score=None, test_score=None, files={})
    report = _report(layout.root)
    assert "accuracy on test, one seed; there is no score of a teacher" in _opening(report)
    assert "is missing" not in report.markdown
    config = read_record(layout.run("fft", 0).record).config | {"teacher": {"probabilities": "asked.parquet"}}
    edit_record(layout.run("fft", 0).record, score=80.0, config=config)  # by a table that covers validation, too
    assert "accuracy on test, one seed; there is no score of a teacher" in _opening(_report(layout.root))
    records = [run.record for run in load_experiment(layout.root).runs]
    assert "on the test split" in arm_table(records).caption
    records[1].test_score = None  # one rule: no headline in the terminal that is not the report's
    assert "on the validation split" in arm_table(records).caption


def test_copies_that_are_cut_are_not_called_unlabelled_texts(tmp_path):
    """Who gave no unlabelled texts was told how many of them were cut."""
    layout = make_experiment(tmp_path / "reviews", arms=("kd-lora",), seeds=(0,))
    cut = {"train": 8, "unlabelled": 22, "unlabelled (by the teacher)": 31}
    for rows, name in (({"copies": 9}, "copies"), ({"unlabelled": 5, "copies": 9}, "unlabelled and copies")):
        edit_record(layout.run("kd-lora", 0).record, truncated=cut, rows={"train": 3600} | rows)
        told = f"cut at the maximum length: train 8, {name} 22, {name} (by the teacher) 31 ("
        assert told in _report(layout.root).markdown


def test_training_texts_among_those_of_the_headline_are_told(tmp_path):
    """Who is only shown the report believes a score on texts that the model has learnt."""
    layout = make_experiment(tmp_path / "reviews", arms=("fft",), seeds=(0,), test_split=True)
    for plan in ("[", '{"duplicates": {"train and test": 7, "train and validation": 9}}'):
        layout.plan.write_text(plan)
        told = "7 of the test texts are training texts, too" in _report(layout.root).markdown
        assert told == ("7" in plan)


def test_the_papers_tables_stand_beside_ours(tmp_path):
    """A figure of the paper in the wrong column would be believed; a column of dashes leaves a reader puzzled."""
    arms = ("fft", "kd-lora", "student-lora")
    own = _report(make_experiment(tmp_path / "own", arms=arms, rows=40).root).markdown
    assert "|  | FFT | KD-LoRA | student LoRA |" in own
    assert "Less inference time" not in own  # its claims are shown on demand
    layout = make_experiment(tmp_path / "mrpc", task=PAIRS, arms=arms, rows=40)
    layout.config.write_text("data: {path: glue}\nfamily: bert\nreport: {paper: true}\n")
    report = _report(layout.root)
    rows = [line.split(" | ") for line in report.markdown.splitlines() if line.startswith("|")]
    assert ["| ", "FFT", "LoRA", "KD-LoRA", "student LoRA |"] in rows
    assert ["| paper, BERT", "89.0", "89.2", "88.3", "– |"] in rows
    assert ["| paper, DeBERTaV3", "91.9", "90.9", "90.7", "– |"] in rows
    costs = next(row for row in rows if row[:2] == ["| paper, distilbert-base-uncased", "KD-LoRA"])
    assert [cell.replace("\u00a0", " ") for cell in costs[2:8]] == ["1.2 M", "–", "–", "66 M", "296.8 MB", "5.36 s"]
    kept = next(row[1].replace("\u00a0", " ") for row in rows if row[0] == "| Score kept, of full fine-tuning")
    mean, low, high = map(float, re.findall(r"[\d.]+(?= ±)|(?<=\()[\d.]+|(?<=to )[\d.]+", kept))
    assert low < mean < high  # seeds that agree know nothing of other rows, so a deviation is not enough
    assert f"; 95% interval of the share {low:.1f} to {high:.1f}%" in report.markdown
    claim = next(row for row in rows if row[0] == "| Less inference time than full fine-tuning")
    assert claim[2:] == ["30%", "12%", "38%", "28% |"]
    markdown = _report(make_experiment(tmp_path / "mnli", task=MNLI, rows=40).root).markdown
    assert "| accuracy, matched (%) |" in markdown  # one of the two accuracies alone is not MNLI's score
    assert "| paper, BERT, mismatched | 84.9 | 83.9 | 82.4 |" in markdown
    assert "| paper, BERT | 84.7 | 83.7 | 82.2 |" in markdown


@pytest.mark.drawn
@pytest.mark.parametrize(
    ("task", "title"),
    [
        (BINARY, "Confusion matrix of KD-LoRA"),
        (SIMILARITY, "Predictions of KD-LoRA against labels"),
        (TAGS, "Every label"),
        (INTENTS, "Most frequent confusions of KD-LoRA"),  # a matrix of 30 labels cannot be read
    ],
    ids=lambda value: f"{value.kind}-{value.num_labels}" if isinstance(value, Task) else "",
)
def test_every_kind_of_task_has_its_plots_and_every_label_its_figures(tmp_path, task, title):
    """A plot that disappears for one kind of task; a class that a student has lost hides behind any score."""
    arms = {"fft": "FFT", "kd-lora": "KD-LoRA", "student-lora": "student LoRA"}  # the control shows who is to blame
    layout = make_experiment(tmp_path / "e", task=task, arms=tuple(arms), seeds=(0,))
    report = _report(layout.root)
    always = ("Score against parameters", "Score against latency", "Validation score")
    for one in (*always, title, "Differences with their intervals"):
        assert one in report.html
    assert ("Calibration" in report.html) == (task.kind != "regression")
    assert ("Confusion matrix" in report.html) == ("Confusion matrix" in title)
    assert len(report.html.encode()) < 3_000_000
    elements = _check(report.html)
    drawings = [own for tag, own in elements if tag == "svg" and own.get("role") == "img"]
    assert len(drawings) >= 5
    ids = [own["id"] for _, own in elements if own.get("id")]
    assert len(ids) == len(set(ids))
    assert all(set(own["aria-labelledby"].split()) <= set(ids) for own in drawings)
    lines = [line.strip("| ").split(" | ") for line in report.markdown.splitlines() if line.startswith("| ")]
    found = iter(lines[next((row for row, line in enumerate(lines) if line[:2] == ["label", "model"]), -1) + 2 :])
    for (column, name), arm in product(enumerate(task.label_names if task.kind != "regression" else ()), arms):
        kept = read_predictions(layout.run(arm, 0).predictions)
        several = kept.labels.ndim == 2
        wanted = kept.labels[:, column] if several else kept.labels == column
        said = kept.logits[:, column] > 0 if several else kept.logits.argmax(axis=1) == column
        figures = precision_recall_fscore_support(wanted, said, average="binary", zero_division=0)[:3]
        told = [name, arms[arm], str(int(wanted.sum())), *(f"{100 * value:.1f}" for value in figures)]
        assert next(found) == told


def test_links_lead_to_the_records(tmp_path):
    """A figure that cannot be traced to its run is a claim."""
    layout = make_experiment(tmp_path / "a folder, with #signs?")
    report = make_report(layout.root, out=tmp_path / "elsewhere", draws=200)
    elements = _check(report.html)
    links = [own["href"] for tag, own in elements if tag == "a"]
    records = [link for link in links if not link.startswith("#")]
    assert {Path(unquote(link)).name for link in records} == {"run.json"}
    for link in records:
        assert (tmp_path / "elsewhere" / unquote(link)).resolve().is_file()
    ids = {own.get("id") for _, own in elements}
    assert {link[1:] for link in links if link.startswith("#")} <= ids
    in_markdown = re.findall(r"\]\(([^)#]+)\)", report.markdown)
    assert {unquote(link) for link in in_markdown} == {unquote(link) for link in records}


@pytest.mark.drawn
@pytest.mark.parametrize(
    "task",
    [
        Task("single-label", HOSTILE[:1], HOSTILE[1:2], HOSTILE, (f"average_precision:{HOSTILE[0]}",)),
        Task("tokens", ("words",), ("tags",), tag_names(("<i>x</i>", "PER|*a*")), ("entity_f1",)),
    ],
    ids=["labels", "types"],
)
def test_text_from_outside_is_escaped_in_html(tmp_path, task):
    """A label named <script> would run in the browser of whoever opens the report."""
    layout = make_experiment(tmp_path / "e", task=task, texts=HOSTILE, failed=[("lora", 0)], rows=60)
    ship(layout, names=HOSTILE, recipe=HOSTILE[0])
    for run in layout.runs.iterdir():
        content = json.loads((run / "run.json").read_text())
        content |= {"experiment": HOSTILE[0], "notes": list(HOSTILE), "config": {HOSTILE[3]: HOSTILE[4]}}
        content |= {"model": HOSTILE[3], "teacher_model": HOSTILE[0], "machine": {"cpu": HOSTILE[3]}}
        content |= {"error": HOSTILE[0]} if content["status"] == "failed" else {}
        (run / "run.json").write_text(json.dumps(seal(content)))
    report = _report(layout.root)
    assert task.kind != "tokens" or ">&lt;i&gt;x&lt;/i&gt;</small>" in report.html
    assert task.kind != "tokens" or r"PER\|\*a\*" in report.markdown
    elements = _check(report.html)
    tags = [tag for tag, _ in elements]
    assert set(tags).isdisjoint({"i", "img", "iframe", "object", "base", "form"})
    assert tags.count("script") == 1, "the page's own, and the only one that its policy lets run"
    for _, own in elements:
        assert not any(name.startswith("on") for name in own)
        assert not own.get("href", "").lower().startswith("javascript")


def test_text_from_outside_is_escaped_in_markdown(tmp_path):
    """A label with a bar or a line break would tear the table apart; a text would become a link."""
    task = Task("multi-label", ("text",), ("tags",), HOSTILE, tuple(f"recall@0.5:{name}" for name in HOSTILE))
    layout = make_experiment(tmp_path / "e", task=task, texts=[*HOSTILE, "# no heading", "1. no list", "- no item"])
    ship(layout, names=HOSTILE, recipe=HOSTILE[1])
    edit_json(layout.export_record, failure=HOSTILE[0])
    report = _report(layout.root)
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(report.markdown)
    inline = [child for token in tokens for child in token.children or []]
    html = "".join(token.content for token in [*tokens, *inline] if token.type.startswith("html"))
    assert re.sub(r'<a id="[a-z]*">|</a>', "", html).strip() == ""
    hrefs = [str(child.attrGet("href")) for child in inline if child.type == "link_open"]
    assert hrefs
    known = ("run.json", "benchmark.json", "kdlora_export.json")
    assert all(href.startswith("#") or href.endswith(known) for href in hrefs)
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings
    assert "no heading" not in headings
    for line in report.markdown.splitlines():
        if line.startswith("| "):
            assert len(re.split(r"(?<!\\)\|", line)) - 2 in (5, 6, 9, 10, 11, 13), line


def test_missing_and_damaged_predictions_cost_their_parts_only(tmp_path):
    """One lost file must not lose the report, and must not go unnoticed."""
    layout = make_experiment(tmp_path / "reviews")
    layout.run("kd-lora", 1).predictions.unlink()
    layout.run("fft", 0).predictions.write_bytes(b"PAR1 broken")
    report = _report(layout.root)
    text = _plain(report.html)
    told = "kd-lora, seed 1: its predictions cannot be read (predictions.parquet: there is no such file. Delete the run"
    assert told in text
    assert ". Tables and plots that need them leave that run out." in text
    assert "fft, seed 0: its predictions cannot be read" in text
    assert "accuracy on validation, 3 seeds" in _opening(report)
    assert "95% interval" in _opening(report)
    for arm in ARMS:
        for seed in range(3):
            layout.run(arm, seed).predictions.unlink(missing_ok=True)
    layout.examples.unlink()
    bare = _report(layout.root)
    assert "(not paired: predictions are missing)" in _opening(bare)
    assert "No predictions were kept" in bare.html
    assert "There are no examples to show" in bare.html


def test_disagreements_show_opposite_decisions_first(reviews):
    """A list that starts with mere differences in confidence wastes the reader's time."""
    html = reviews[1].html
    first = html[html.index('class="quotations"') :].split("</li>")[0]
    facts = re.findall(r'<dt>(.*?)</dt><dd dir="auto">(.*?)</dd>', first)
    assert [name for name, _ in facts] == ["id", "label", "teacher", "student, mean of 3 seeds"]
    assert facts[2][1].split(",")[0] != facts[3][1].split(",")[0]
    assert '<blockquote><p dir="auto">' in first  # Hebrew stood in the order of English


def test_runs_of_different_tasks_in_one_folder_are_refused(tmp_path):
    """Accuracy and Pearson would be averaged into one figure."""
    layout = make_experiment(tmp_path / "mixed", task=PAIRS)
    other = make_experiment(tmp_path / "other", task=SIMILARITY, experiment="mixed")
    for run in other.runs.iterdir():
        shutil.copytree(run, layout.runs / f"{run.name}-stsb")
    with pytest.raises(ArtifactError, match="its runs are of different tasks"):
        _report(layout.root)


def test_a_student_that_always_says_the_same_is_named(reviews, tmp_path):
    """69% accuracy on CoLA is what the most frequent label gets."""
    layout = make_experiment(tmp_path / "e")
    path = layout.run("kd-lora", 1).predictions
    logits = np.tile(np.arange(2, dtype=np.float32), (400, 1))
    write_predictions(path, replace(read_predictions(path), logits=logits))
    text = _plain(_report(layout.root).html)
    told = (
        "KD-LoRA (seed 1) predicts the same for every validation example: it has learnt little or nothing. Accuracy do"
    )
    assert told in text
    assert "predicts the same" not in reviews[1].html
    for arm, seed in ((arm, seed) for arm in ARMS for seed in range(3)):  # of rows that are all alike it is no wonder
        if (path := layout.run(arm, seed).predictions).exists():
            found = read_predictions(path)
            write_predictions(path, replace(found, labels=np.ones_like(found.labels)))
    assert "predicts the same" not in _report(layout.root).html


def test_models_of_one_size_save_nothing_and_no_model_saves_everything(tmp_path):
    """Jitter was told as a saving: "0% fewer parameters and 23% less time". 4.4 of 1,240 million: "100% fewer"."""
    layout = make_experiment(tmp_path / "e", arms=("fft", "student-lora"))
    for teacher, student, told in (
        (109_500_000, 109_500_000, ""),
        (109_500_000, 109_400_000, " with 49% less time per text"),
        (1_240_000_000, 4_400_000, " with 99.6% fewer parameters and 49% less time per text"),
    ):
        for seed in range(3):
            edit_record(layout.run("fft", seed).record, total_parameters=teacher)
            edit_record(layout.run("student-lora", seed).record, total_parameters=student)
        report = _report(layout.root)
        assert f"accuracy on validation, 3 seeds){told}. What distillation adds" in _opening(report)
        assert "100% fewer" not in report.html


def test_times_of_two_machines_are_not_compared(tmp_path):
    """A teacher of a CPU and a student of the GPU on which the folder went on: "99% less time per text"."""
    layout = make_experiment(tmp_path / "e")
    for seed in range(3):
        edit_record(layout.run("kd-lora", seed).record, device="cuda:0 (NVIDIA H100)")
    report = _report(layout.root)
    assert "39% fewer parameters. " in _opening(report)
    assert report.html.count("the teacher was measured on another machine") == 2
    assert "Measured on cpu, Intel Xeon, 2 cores, trained in fp32; cuda:0 (NVIDIA H100)" in report.markdown
    assert "do not compare them between rows" in report.markdown
    records = [run.record for run in load_experiment(layout.root).runs]
    assert arm_table(records).caption.endswith("; times are of several machines or numbers of threads")
    assert "Score against parameters" in report.html
    assert "Score against latency" not in report.html


def test_links_to_another_drive(tmp_path, monkeypatch):
    """On Windows no relative path leads to another drive: a traceback after the bootstrap's minutes."""

    def refuse(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr("os.path.relpath", refuse)
    experiment = load_experiment(make_experiment(tmp_path / "e", arms=("fft",), seeds=(0,), rows=2).root)
    assert experiment.href(tmp_path / "a run.json") == f"{tmp_path.resolve().as_uri()}/a%20run.json"


@pytest.mark.drawn
def test_a_record_without_costs_leaves_dashes_and_strange_histories_are_drawn(tmp_path):
    """0 bytes and 0 ms would be the best model of all, and of a teacher with score 0 every share is infinite."""
    layout = make_experiment(tmp_path / "e")
    bare = dict.fromkeys(("peak_memory_bytes", "total_parameters", "size_bytes", "train_seconds"))
    history = [{"epoch": 1.0, "score": 80.0, "hard_loss": None, "loss": "x"}, {"step": 3}]  # diverged after one epoch
    for run in layout.runs.iterdir():
        changes = {"score": 0.0} if run.name.startswith("fft") else {}
        edit_record(run / "run.json", latency=[], history=history, **bare, **changes)
    report = _report(layout.root)
    assert re.search(r"It scores \d+\.\d ± \d\.\d against 0\.0 ± 0\.0 of", _opening(report))
    assert "parameters" not in _opening(report)
    assert "Validation score" in report.html
    for missing in ("Score against", "Training memory"):
        assert missing not in report.html
    assert "nan" not in report.html.lower().replace("finance", "")
    _check(report.html)
