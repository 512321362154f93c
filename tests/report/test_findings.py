"""What the report finds: pairs of arms, which student ships, and what becomes of entities."""

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest

import fabricate
from fabricate import BINARY, MNLI, NAMES, TAGS, TOPICS, edit_record, make_experiment, make_predictions
from kdlora.configfile import build_config
from kdlora.data.tags import spans_of
from kdlora.data.tasks import Task
from kdlora.evidence.defer import Deferring, stated
from kdlora.evidence.predictions import Predictions, read_examples, read_predictions
from kdlora.evidence.ranking import counts_from_logits, entity_rates
from kdlora.evidence.records import read_record
from kdlora.evidence.stats import Difference
from kdlora.experiment.preview import ExperimentPlan
from kdlora.report.card import card_metadata, student_card
from kdlora.report.collect import load_experiment
from kdlora.report.deferred import tell_refusals
from kdlora.report.findings import Comparison, _reason, align, choose_student, compare_arms, read_choice
from kdlora.report.outputs import OUTCOMES, _label_confusions, _quotations, count_labels, outcomes
from kdlora.report.paper import family_of
from kdlora.report.report import make_report


@pytest.mark.parametrize("task", [TOPICS, TAGS], ids=lambda task: task.kind)
def test_rows_in_another_order_are_brought_into_line(task):
    """Pairing by position would compare the predictions of different texts."""
    first = make_predictions(task)
    moved = first.take([3, 1, 0, 2, 7, 6, 5, 4])
    aligned = align([first, moved])
    assert moved.ids == tuple("31027654")
    assert np.array_equal(aligned[1].logits, first.logits)
    assert np.array_equal(aligned[1].labels, first.labels)
    assert aligned[1].ids == first.ids


def test_other_examples_labels_or_names_are_not_aligned():
    """The same ids with other labels are another data set."""
    first = make_predictions(TOPICS)
    for other in (
        {"labels": (first.labels + 1) % 4},
        {"ids": (*first.ids[:-1], "other")},
        {"ids": (*first.ids[:-1], "0")},
        {"label_names": first.label_names[::-1]},
        {"groups": ("matched",) * 8},
    ):
        assert align([first, replace(first, **other)]) is None, other
    assert align([replace(first, ids=("0",) * 8)]) is None
    # MNLI's matched and mismatched rows both count from 0.
    one = replace(make_predictions(MNLI), ids=tuple("01230123"), groups=("matched",) * 4 + ("mismatched",) * 4)
    aligned = align([one, one])
    assert np.array_equal(aligned[1].logits, one.logits)


def test_controls_are_compared_on_common_seeds_and_the_teacher_on_all_of_its_own(tmp_path):
    """A control with other seeds would differ by the seeds as well as by the teacher."""
    make_experiment(tmp_path / "e", failed=[("student-lora", 1), ("fft", 1), ("fft", 2)])
    experiment = load_experiment(tmp_path / "e")
    found = {one.second: one.difference for one in compare_arms(experiment, draws=100)}
    assert list(found) == ["student-lora", "fft", "lora"]
    assert (found["student-lora"].n_seeds, found["fft"].n_seeds) == (2, 3)


def test_a_bag_of_words_and_a_given_teacher_are_one_run(tmp_path):
    """Where other seeds came first, they had a spread of 0, and the student was compared on these seeds alone."""
    made = make_experiment(tmp_path / "e", arms=("kd-lora", "student-lora"))
    for arm in ("words", "fft"):
        once = make_experiment(tmp_path / arm, arms=("student-lora",), seeds=(0, 1))
        for seed in (0, 1):
            edit_record(once.run("student-lora", seed).record, arm=arm)
            once.run("student-lora", seed).root.rename(made.run(arm, seed).root)
    for config, seeds in (({}, 2), ({"teacher": {"fine_tuned": "someone/model"}}, 3)):
        edit_record(made.run("fft", 1).record, config=config)
        experiment = load_experiment(made.root)
        assert experiment.score("words").sd is None
        assert (experiment.score("fft").sd is None) == bool(config)
        found = {one.second: one.difference.n_seeds for one in compare_arms(experiment, draws=50)}
        assert found == {"student-lora": 3, "words": 3, "fft": seeds}


def test_the_papers_figures_belong_beside_the_papers_models():
    """Its costs beside another model would be believed."""
    assert family_of("google-bert/bert-base-uncased", "/models/distilbert-base-uncased/") == "bert"
    assert family_of("roberta-base", "distilbert-base-uncased") is None
    assert family_of(None, None) is None


STUDENTS = ("kd-lora", "kd-fft", "student-lora", "student-fft")


def choose(folder, **noise):
    """Fabricate an experiment whose arms are as noisy as told, and choose."""
    with pytest.MonkeyPatch.context() as patch:
        for arm, value in noise.items():
            patch.setitem(fabricate._NOISE, arm.replace("_", "-"), value)
        make_experiment(folder, arms=("fft", *(arm for arm in STUDENTS if arm.replace("-", "_") in noise)))
    return load_experiment(folder).choice


@pytest.mark.parametrize(
    ("noise", "shipped", "against"),
    [
        ({"kd_lora": 0.40, "student_lora": 0.70}, "kd-lora", "student-lora"),
        ({"kd_lora": 0.70, "student_lora": 0.40}, "student-lora", "kd-lora"),
        ({"kd_lora": 0.70, "student_lora": 0.45, "student_fft": 0.40}, "student-fft", "kd-lora"),
        ({"kd_lora": 0.54, "student_lora": 0.50}, "kd-lora", "student-lora"),  # within one standard error of the best
        ({"kd_lora": 0.58, "student_lora": 0.50}, "student-lora", "kd-lora"),  # within its 95% interval alone
        ({"kd_lora": 0.52, "kd_fft": 0.50}, "kd-fft", "kd-lora"),
        ({"kd_lora": 0.54, "kd_fft": 0.52, "student_fft": 0.50}, "kd-fft", "student-fft"),
        ({"kd_lora": 0.80, "kd_fft": 0.40, "student_fft": 0.60}, "kd-fft", "student-fft"),
        ({"student_fft": 0.5}, "student-fft", None),
    ],
)
def test_the_best_on_validation_ships_and_within_a_standard_error_the_distilled_one(tmp_path, noise, shipped, against):
    """An arm that always ships may be the worst by ten points."""
    found = choose(tmp_path / "e", **noise)
    assert (found.arm, found.against) == (shipped, against)
    experiment = load_experiment(tmp_path / "e")
    scores = {run.record.seed: run.record.score for run in experiment.finished(shipped)}
    assert found.seed == max(scores, key=lambda seed: scores[seed])
    assert set(found.scores) == {arm.replace("_", "-") for arm in noise}
    if max(found.scores, key=lambda arm: found.scores[arm]) != shipped:
        assert "within one standard error of the best, the student" in found.sentence


def test_arms_of_other_seeds_are_not_said_to_be_above(tmp_path):
    """Of three seeds and of two: the mean may be above where the common seeds are below."""
    below = Comparison("kd-lora", "student-lora", Difference(-1.0, -1.5, -0.5, 0.01, 100, 2, 100, 0.95), -1.0)
    told = _reason("kd-lora", below, is_best=True)
    assert "has the highest mean of its own seeds, 1.0 points below the student without a teacher" in told


def test_a_promise_is_not_rounded_to_another():
    """0.25% were "0.2%", and a confidence of 99.9% was "100%"."""
    assert [stated(0.0025, 1), stated(0.02, 1), stated(0.999, 0), stated(0.95, 0)] == ["0.25%", "2.0%", "99.9%", "95%"]


def test_a_refusal_of_several_files_is_told_once():
    """The same sentence stood there three times, and of the terminal's nobody knew which file it was of."""
    flat = (0.1,) * 100
    reasons = {"a": "no.", "b": "", "c": "no.", "d": "x."}
    models = [Deferring(name, 0.1, flat, reason=reason) for name, reason in reasons.items()]
    assert tell_refusals(models) == "a; c: no. d: x."


def test_a_student_without_a_teacher_has_none_on_its_card(tmp_path):
    """A model on the Hub that says it was distilled, and was not."""
    record = read_record(make_experiment(tmp_path, arms=("student-fft",)).run("student-fft", 0).record)
    assert card_metadata(record)["tags"] == ["kdlora"]
    assert "- teacher: none" in student_card(record)

    # Of several labels transformers' pipeline gives the best one alone, unless it is asked for all.
    # And of a text that is too long it fails, unless it is asked to cut.
    assert 'PATH_OF_THIS_FOLDER", truncation=True)\n```' in student_card(record)
    record, above = fabricate.make_record(task=TAGS), "each whose score is above 0.5"
    assert (
        f'PATH_OF_THIS_FOLDER", truncation=True, top_k=None)\n# Any number of labels holds: {above}\n```'
        in student_card(record)
    )
    assert f"{above} (thresholds are of kdlora's probabilities, not of these)\n```" in student_card(
        record, decisions=["a threshold"]
    )


def test_f1_of_two_classes_is_told_with_its_label(tmp_path):
    """F1 is of the second label, which is often the frequent one: `unique` after `duplicate`."""
    task = replace(BINARY, label_names=("duplicate", "unique"), metrics=("f1",))
    layout = make_experiment(tmp_path / "one", task=task, seeds=(0,))
    card, report = student_card(read_record(layout.run("kd-lora", 0).record)), make_report(layout.root).markdown
    config = build_config({"family": "bert", "data": {"train": "train.csv"}})
    plan = ExperimentPlan(config, task, {}, {"unique": 9}, {"unique": 9}, {}, {}, (), 0.0)
    for told in (card.split("\n---\n")[1], report, dict(plan.lines())["task"]):
        bare = told.replace("| recall | F1 |", "").lower().replace("f1 of unique", "")  # a table has both labels
        assert "F1 of unique" in told
        assert "f1" not in bare


def test_a_class_without_rows_is_no_row_of_zeros():
    """0% of a class that no row has reads as a class that the student never gets right."""
    task = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("accuracy",))
    run = Predictions(("0", "1", "2"), ("test",) * 3, np.eye(3), task.label_names, np.array([0, 1, 1]))
    assert _label_confusions(task, "kd-lora", [run])[0].rows[2] == ("c", "–", "–", "–")


def test_the_figures_of_an_only_label_are_of_the_label():
    """Of one label scikit-learn gives the figures of its absence: 86 for a model that never says it."""
    task = Task("multi-label", ("text",), ("urgent",), ("urgent",), ("micro_f1",))
    never = np.full((4, 1), -1.0)
    run = Predictions(tuple("0123"), ("test",) * 4, never, task.label_names, np.array([[1], [0], [0], [0]]))
    assert count_labels(task, [run]).tolist() == [[[0, 0, 1]]]


def test_quoted_probabilities_are_those_of_the_models(tmp_path):
    """Beside a text stood 53% where the teacher says 44%, for labels are said above a fitted threshold."""
    found = load_experiment(make_experiment(tmp_path / "e", task=TAGS, seeds=(0,)).root)
    aligned = [found.predictions(arm)[0] for arm in ("fft", "kd-lora")]
    shifted = [replace(one, shift=0.3) for one in aligned]
    assert _quotations(TAGS, aligned, found.examples)
    assert _quotations(TAGS, shifted, found.examples) == _quotations(TAGS, aligned, found.examples)


def test_examples_are_of_the_rows_whose_text_was_kept(tmp_path):
    """Of a classifier whose first 32 rows had no text, the report said that both models agree on every word."""
    found = load_experiment(make_experiment(tmp_path / "e", seeds=(0,)).root)
    aligned = [found.predictions(arm)[0] for arm in ("fft", "kd-lora")]
    distance = np.abs(np.diff([one.logits[:, 1] - one.logits[:, 0] for one in aligned], axis=0))[0]
    kept = (aligned[0].split[0], aligned[0].ids[int(distance.argmin())])
    told = _quotations(found.task, aligned, {kept: found.examples[kept]})
    assert [one.facts["id"] for one in told] == [kept[1]]


def test_validation_chooses_and_only_among_scores_that_are_defined(tmp_path):
    """A choice by the test split makes its score too high; the NaN of a constant regression would win or crash."""
    layout = make_experiment(tmp_path / "e", arms=("fft", "kd-lora", "student-lora"), test_split=True)
    for seed in range(3):
        edit_record(layout.run("student-lora", seed).record, test_score=99.0)
    assert load_experiment(layout.root).choice.arm == "kd-lora"
    for seed in range(3):
        edit_record(layout.run("kd-lora", seed).record, score=None)
    found = load_experiment(layout.root).choice
    assert (found.arm, found.scores["kd-lora"]) == ("student-lora", None)


def test_what_is_better_on_common_seeds_is_not_left_behind(tmp_path):
    """Beside a control with more seeds, of two students that are above it on the common one, the worse one shipped."""
    found = load_experiment(make_experiment(tmp_path / "e", arms=("fft", "kd-fft", "student-lora")).root)
    easy = dict.fromkeys((1, 2), 99.0)
    runs = []
    for run in found.runs:
        record = run.record
        if record.arm == "student-lora":
            runs.append(replace(run, record=record.model_copy(update={"score": easy.get(record.seed, record.score)})))
        elif record.seed == 0:
            runs.append(run)
    choice = choose_student(found.task, runs)
    assert choice.scores["student-lora"] > choice.scores["kd-fft"]
    assert (choice.arm, choice.difference.sign or 1) == ("kd-fft", 1)
    assert "above the student without a teacher (student-lora), whose own seeds have the highest" in choice.sentence


@pytest.mark.parametrize("seed", [1, None])
def test_the_teacher_that_is_quoted_is_the_one_that_taught(tmp_path, seed):
    """Beside a text stood what another seed of the teacher says, which taught nobody."""
    layout = make_experiment(tmp_path / "e", seeds=(0, 1))
    for run in layout.runs.iterdir():
        config = {"teacher": {"seed": seed}, "run": {"seeds": [1, 0]}}
        edit_record(layout.runs / run.name / "run.json", config=config)
    found = load_experiment(layout.root)
    taught = next(run for run in found.finished("fft") if run.record.seed == 1)
    assert np.array_equal(found.teacher_predictions.logits, taught.predictions.only(found.split).logits)


@pytest.mark.parametrize(("noise", "shipped"), [(0.55, "kd-fft"), (1.2, "kd-lora")])
def test_few_rows_do_not_choose_between_distilled_students(tmp_path, monkeypatch, noise, shipped):
    """One or two of 150 rows let the one by adapters win, which is the worse one on most sets."""
    monkeypatch.setitem(fabricate._NOISE, "kd-fft", noise)
    root = make_experiment(tmp_path / "e", arms=("fft", "kd-lora", "kd-fft"), seeds=(0,), rows=150).root
    choice = load_experiment(root).choice
    assert choice.scores["kd-lora"] > choice.scores["kd-fft"]
    assert choice.arm == shipped


def test_of_equal_distilled_students_the_fully_tuned_one_ships(tmp_path):
    """With few validation rows ties are frequent, and it is the better one on most sets."""
    root = make_experiment(tmp_path / "e", arms=("fft", "kd-lora", "kd-fft"), seeds=(0,)).root
    by_adapters = next(run for run in load_experiment(root).runs if run.record.arm == "kd-lora")
    fully = replace(by_adapters, record=by_adapters.record.model_copy(update={"arm": "kd-fft"}))
    assert choose_student(BINARY, [by_adapters, fully]).arm == "kd-fft"


def test_the_report_goes_by_what_was_shipped(tmp_path):
    """A report that chooses anew would speak of another student than the one in `student/`."""
    layout = make_experiment(tmp_path / "e", seeds=(0,))
    found = load_experiment(layout.root).choice
    other = found.model_copy(update={"arm": "student-lora", "sentence": "The other student was shipped: it is."})
    layout.shipped.write_text(other.model_dump_json())
    assert read_choice(layout.shipped) == other
    report = make_report(layout.root, draws=50)
    assert report.markdown.split("\n\n")[1].startswith("**The other student was shipped**: it is. It keeps")
    layout.shipped.write_text("{")
    assert "The distilled student (kd-lora) was shipped" in make_report(layout.root, draws=50).markdown
    layout.shipped.unlink()  # of a suite, or not yet
    told = make_report(layout.root, draws=50).markdown
    assert "**The distilled student (kd-lora) would ship by these runs**: on validation it" in told
    assert "> Nothing has been shipped from this folder" in told


@pytest.mark.parametrize(
    ("predicted", "outcome", "invented"),
    [
        ("B-PER I-PER O O", "right", 0),
        ("B-LOC I-LOC O O", "other type", 0),
        ("B-PER O O O", "other edges", 0),
        ("B-PER I-PER I-PER O", "other edges", 0),
        ("B-LOC O O O", "both", 0),
        ("B-LOC B-PER O O", "other edges", 0),  # that of the same type counts
        ("O O O O", "missed", 0),
        ("O O B-LOC B-PER", "missed", 2),
        ("B-PER I-PER O B-PER", "right", 1),
    ],
)
def test_what_becomes_of_an_entity(predicted, outcome, invented):
    """An error of the edge that is shown as one of the type sends its reader to the wrong labels."""
    rows = (predicted, "B-PER I-PER O O")
    tags, labels = (np.array([NAMES.label_names.index(tag) for tag in row.split()]) for row in rows)
    found, taken, added = outcomes(NAMES, tags, labels, np.array([0, 4]))
    assert found[NAMES.label_types.index("PER")].tolist() == [int(name == outcome) for name in OUTCOMES]
    assert (found.sum(), added.sum()) == (1, invented)
    assert taken.sum() == (outcome != "missed")


def test_rows_and_words_without_labels_are_kept_apart():
    """An entity at the end of a row would be met by one at the beginning of the next."""
    names = NAMES.label_names
    labels = np.array([names.index("B-PER"), -100, names.index("B-LOC"), 0])
    tags = np.array([0, names.index("B-PER"), names.index("B-LOC"), names.index("I-LOC")])
    found, _, invented = outcomes(NAMES, tags, labels, np.array([0, 2, 4]))
    by_type = {kind: found[place].tolist() for place, kind in enumerate(NAMES.label_types)}
    assert by_type["PER"] == [0, 0, 0, 0, 1]
    assert by_type["LOC"] == [0, 0, 1, 0, 0]
    assert invented.sum() == 0


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A report of three arms, and the folder."""
    layout = make_experiment(tmp_path_factory.mktemp("spans") / "names", task=NAMES, rows=80)
    return layout, make_report(layout.root, draws=100)


def test_the_answer_is_in_entity_f1_and_every_type_has_its_figures(told):
    """An accuracy of words would be near 90% for a model that finds no name."""
    layout, report = told
    assert "entity F1 on validation, 3 seeds" in report.markdown
    runs = [read_predictions(layout.run("kd-lora", seed).predictions) for seed in range(3)]
    for place, name in enumerate(NAMES.label_types):
        counts = [counts_from_logits(one.label_names, one.logits, one.labels, one.offsets).sum(axis=0) for one in runs]
        figures = [" ± ".join(f"{figure:.1f}" for figure in (100 * np.mean(one), 100 * np.std(one, ddof=1)))
                   for one in zip(*(entity_rates(seed[place]) for seed in counts), strict=True)]  # fmt: skip
        row = f"| {name} | KD-LoRA | {counts[0][place, 2]} | {' | '.join(figures)} |"
        assert row in report.markdown.replace("\u00a0", " ")
    assert "What becomes of entities, by KD-LoRA" in report.markdown


def test_what_is_not_there_is_no_figure(tmp_path, monkeypatch):
    """A type that no row has is not found in 0% of the cases, and two models that agree have kept their examples."""
    monkeypatch.setattr(fabricate, "_NOISE", dict.fromkeys(fabricate.ARMS, 0.0))
    layout = make_experiment(tmp_path / "names", task=NAMES, rows=1)
    markdown = make_report(layout.root, draws=10).markdown
    kept = read_predictions(layout.run("kd-lora", 0).predictions)
    absent = [name for place, name in enumerate(NAMES.label_types) if 2 * place + 1 not in kept.labels]
    assert absent
    assert all(f"| {name} | KD-LoRA | 0 | – | – | – |" in markdown for name in absent)
    assert "teacher and student agree on every word" in markdown
    assert "Most frequent confusions" not in markdown


def test_marked_sentences_are_those_of_the_predictions(told):
    """Marks that slip by a word accuse a model, or a label, of what it never said."""
    layout, report = told
    examples = read_examples(layout.examples)
    quoted = re.findall(r'<li class="wide">(.*?)</li>', report.html, re.DOTALL)
    assert len(quoted) == 8
    teacher = read_predictions(layout.run("fft", 0).predictions)
    for quotation in quoted:
        identity = re.search(r'<dt>id</dt><dd dir="auto">(\d+)</dd>', quotation)[1]
        example, row = examples["validation", identity], teacher.ids.index(identity)
        lines = dict(re.findall(r'<p class="marked (\w+)"><span class="who">\w+</span><bdi>(.*?)</bdi></p>', quotation))
        assert list(lines) == ["label", "teacher", "student"]
        for line in lines.values():
            text = re.sub(r' <small dir="auto">.*?</small>', "", line)
            assert unescape(re.sub(r"</?mark>", "", text)) == example.text
        own = teacher.labels[teacher.offsets[row] : teacher.offsets[row + 1]]
        expected = [
            (example.text[example.starts[one.start] : example.ends[one.end - 1]], one.type)
            for one in spans_of(own, NAMES.label_names)
        ]
        found = re.findall(r'<mark>(.*?) <small dir="auto">(.*?)</small></mark>', lines["label"])
        assert [(unescape(text), kind) for text, kind in found] == expected
        listed = ", ".join(f"{text} ({kind})" for text, kind in expected)
        assert f"  - label: {listed}" in report.markdown


def test_long_texts_are_quoted_from_before_the_first_difference(tmp_path):
    """The beginning of a long text, on which both agree, would be shown as a disagreement."""
    layout = make_experiment(tmp_path / "long", task=NAMES, rows=3, texts=("word " * 400,), arms=("fft", "kd-lora"))
    report = make_report(layout.root, draws=50)
    lines = re.findall(r'<p class="marked \w+">.*?</p>', report.html)
    assert lines
    assert all(len(re.sub(r"<.*?>", "", line)) < 1500 for line in lines)
    facts = re.findall(r"^  - (?:label|teacher|student): .*$", report.markdown, re.MULTILINE)
    assert len(facts) == len(lines)
    assert all(len(line) < 1500 for line in facts)


def test_a_strangers_record_puts_no_markup_into_the_card(told):
    """A results folder may be somebody else's: its arm was a link and a script in the card, which the Hub shows."""
    bad = "kd-x`\n\n<img src=x> [click](javascript:alert(1)) `"
    record = read_record(told[0].run("kd-lora", 1).record)
    card = student_card(record.model_copy(update={"arm": bad, "fingerprints": {"data": "a`![](//x.y/z)"}}))
    assert "`` kd-x` <img src=x> [click](javascript:alert(1)) ` ``" in card
    assert "`` a`![](//x.y/z) ``" in card


def test_the_card_has_the_figures_of_every_type(told):
    """One figure over all types hides that a model misses every address."""
    record = read_record(told[0].run("kd-lora", 1).record)
    card = student_card(record)
    for name in NAMES.label_types:
        figures = " | ".join(f"{record.metrics[f'{what}:{name}']:.4f}" for what in ("precision", "recall", "f1"))
        assert f"| {name} | {figures} |" in card
    results = card_metadata(record)["model-index"][0]["results"][0]
    assert results["task"]["type"] == "token-classification"
    assert {"type": "recall", "name": "recall:PER", "value": round(record.metrics["recall:PER"], 4)} in results[
        "metrics"
    ]
