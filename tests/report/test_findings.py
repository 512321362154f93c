from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fabricate import MNLI, TAGS, TOPICS, make_experiment, make_labels, make_logits
from kdlora.evidence.predictions import Predictions
from kdlora.report.collect import load_experiments
from kdlora.report.findings import align, compare_arms, retention
from kdlora.report.paper import CLAIMS, family_of, published_scores
from kdlora.report.tables import PARAMETERS, saving


def _predictions(task, rows=8, seed=0) -> Predictions:
    labels = make_labels(task, rows)
    return Predictions(
        ids=tuple(str(row) for row in range(rows)),
        split=("validation",) * rows,
        logits=make_logits(task, labels, 0.5, seed),
        label_names=task.label_names,
        labels=labels,
    )


@pytest.mark.parametrize("task", [TOPICS, TAGS], ids=lambda task: task.kind)
def test_rows_and_columns_in_another_order_are_brought_into_line(task):
    """Pairing by position would compare the predictions of different texts, and of different labels."""
    first = _predictions(task)
    rows, columns = [3, 1, 0, 2, 7, 6, 5, 4], list(range(task.num_labels))[::-1]
    labels = first.labels[rows]
    other = Predictions(
        ids=tuple(first.ids[row] for row in rows),
        split=first.split,
        logits=first.logits[rows][:, columns],
        label_names=tuple(task.label_names[column] for column in columns),
        labels=labels[:, columns] if labels.ndim == 2 else np.array([columns.index(label) for label in labels]),
    )
    aligned = align([first, other])
    assert aligned is not None
    assert np.array_equal(aligned[1].logits, first.logits)
    assert np.array_equal(aligned[1].labels, first.labels)
    assert aligned[1].ids == first.ids
    assert aligned[1].label_names == first.label_names


def test_other_examples_labels_or_names_are_not_aligned():
    """The same ids with other labels are another data set."""
    first = _predictions(TOPICS)
    changed = first.labels.copy()
    changed[0] = (changed[0] + 1) % 4
    assert align([first, replace(first, labels=changed)]) is None
    assert align([first, replace(first, ids=(*first.ids[:-1], "other"))]) is None
    assert align([first, replace(first, ids=(*first.ids[:-1], "0"))]) is None
    assert align([first, replace(first, label_names=("a", "b", "c", "d"))]) is None
    assert align([replace(first, ids=("0",) * 8)]) is None
    assert align([first, replace(first, labels=None)]) is None
    assert align([first, replace(first, groups=("matched",) * 8)]) is None
    # MNLI's matched and mismatched rows both count from 0.
    one = replace(_predictions(MNLI), ids=tuple("01230123"), groups=("matched",) * 4 + ("mismatched",) * 4)
    aligned = align([one, one])
    assert aligned is not None
    assert np.array_equal(aligned[1].logits, one.logits)


def test_controls_are_compared_on_common_seeds_and_the_teacher_on_all_of_its_own(tmp_path):
    """A control with other seeds would differ by the seeds as well as by the teacher."""
    make_experiment(tmp_path / "e", failed=[("student-lora", 1), ("fft", 1), ("fft", 2)])
    (experiment,) = load_experiments([tmp_path / "e"])
    found = {one.second: one.difference for one in compare_arms(experiment, draws=100)}
    assert list(found) == ["student-lora", "lora", "fft"]
    assert found["student-lora"] is not None
    assert found["student-lora"].n_seeds == 2
    assert found["fft"] is not None
    assert found["fft"].n_seeds == 3


def test_shares_and_savings(tmp_path):
    """A share of the wrong arm, or a saving with the wrong sign."""
    make_experiment(tmp_path / "e")
    (experiment,) = load_experiments([tmp_path / "e"])
    kept = retention(experiment, "kd-lora", "fft")
    assert kept is not None
    assert kept.mean == pytest.approx(100 * experiment.score("kd-lora").mean / experiment.score("fft").mean)
    assert retention(experiment, "kd-lora", "kd-fft") is None
    sizes = {"arm": "kd-lora", "than": "fft"}
    assert saving(experiment, PARAMETERS, **sizes) == pytest.approx(39.4, abs=0.1)
    assert saving(experiment, replace(PARAMETERS, read=lambda record: None), **sizes) is None
    assert saving(experiment, replace(PARAMETERS, read=lambda record: 0.0), **sizes) is None


def test_the_papers_tables_add_up():
    """A slip in copying a table would be printed beside every experiment."""
    tasks = ("cola", "mnli-matched", "mnli-mismatched", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
    for family, score in published_scores("score").items():
        for arm, published in score.items():
            mean = np.mean([published_scores(task)[family][arm] for task in tasks])
            assert published == pytest.approx(mean, abs=0.11)  # the paper's own means are off by a tenth from its rows
    assert published_scores("ax") == {}
    tables = {claim.text: [claim.in_tables(family) for family in ("bert", "roberta", "deberta-v3")] for claim in CLAIMS}
    assert tables["Less inference time than full fine-tuning"][0] == pytest.approx(12.1, abs=0.1)
    assert tables["Fewer parameters in all than the teacher"] == pytest.approx([40.0, 34.4, 23.4], abs=0.1)
    assert tables["Fewer trainable parameters than LoRA"] == pytest.approx([58.6, 48.3, 48.3], abs=0.1)


def test_families_are_recognised_by_name():
    """The paper's costs belong beside the paper's models only."""
    assert family_of("google-bert/bert-base-uncased", "/models/distilbert-base-uncased/") == "bert"
    assert family_of("roberta-base", "distilbert-base-uncased") is None
    assert family_of(None, None) is None
