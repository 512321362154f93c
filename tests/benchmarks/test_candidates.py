"""The candidates for a better recipe: each does what its paper says, and the key of its work says that it did."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from candidate_averaging import LastEpochs, MovingAverage
from candidate_teachers import folds_of, joined_logits, mean_logits, rows_of_fold, without_fold
from study_plan import NO_PARTS, Parts, Places, Work, configure, read_study, teachers_of

from kdlora.data.load import Splits
from kdlora.distil.logits import TeacherLogits

PLACES = Places(Path("/models"), Path("/glue"), Path("/out"))
STUDY = read_study(Path(__file__).parents[2] / "benchmarks" / "studies" / "candidates.yaml")


def test_parts_are_in_the_key_of_the_arms_that_read_them():
    """A key without them gives the candidate the score of the recipe that it is compared with."""
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    recipes = {name: recipe.parts for name, recipe in STUDY.recipes.items() if recipe.parts != NO_PARTS}
    plain = {arm: Work("sst2", arm, 0, config).key for arm in ("fft", "kd-lora")}
    taught = {Work("sst2", "kd-lora", 0, config, parts=parts).key for parts in recipes.values()}
    assert len(taught | {plain["kd-lora"]}) == len({str(parts) for parts in recipes.values()}) + 1
    assert {Work("sst2", "fft", 0, config, parts=parts).key for parts in recipes.values()} == {plain["fft"]}


class Scalar(nn.Module):
    """One trained number, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(()))
        self.frozen = nn.Parameter(torch.tensor(7.0), requires_grad=False)

    def set(self, value: float) -> None:
        self.trained.data.fill_(value)


def test_the_mean_of_the_last_epochs_is_scored():
    """Copies that follow the weights would all be the last ones, and their mean would look right."""
    model, average = Scalar(), LastEpochs(3)
    for value in (100.0, 1.0, 2.0, 6.0):
        model.set(value)
        average.on_epoch_end(None, None, None, model=model)
    average.on_train_end(None, None, None, model=model)
    assert (model.trained.item(), model.frozen.item()) == (3.0, 7.0)


def test_the_moving_average_forgets_the_initial_weights():
    """Started at the initial weights, the average of a short training would be mostly these."""
    model, average = Scalar(), MovingAverage(0.5)
    for value in (4.0, 8.0, 2.0):
        model.set(value)
        average.on_step_end(None, None, None, model=model)
    average.on_train_end(None, None, None, model=model)
    # (1/4 * 4 + 1/2 * 8 + 1 * 2) / (1/4 + 1/2 + 1) = 7 / 1.75
    assert model.trained.item() == pytest.approx(4.0)
    assert model.frozen.item() == 7.0


def taught(ids: list[str], values: list[float]) -> TeacherLogits:
    return TeacherLogits(ids, np.asarray(values, np.float32)[:, None], ("score",), "print")


def test_teachers_of_other_seeds_are_averaged():
    """A mean over the rows, or of one teacher taken thrice, would look as smooth."""
    mean = mean_logits([taught(["a", "b"], [1.0, 2.0]), taught(["a", "b"], [3.0, -6.0])])
    assert mean.ids.to_pylist() == ["a", "b"]
    assert mean.logits.tolist() == [[2.0], [-2.0]]
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    work = Work("sst2", "kd-lora", 5, config, parts=Parts(teachers=3))
    assert [(one.arm, one.seed) for one in teachers_of(work)] == [("fft", 0), ("fft", 1), ("fft", 2)]
    assert teachers_of(work)[0].key == teachers_of(Work("sst2", "kd-lora", 5, config))[0].key
    assert teachers_of(Work("sst2", "student-lora", 0, config, parts=Parts(teachers=3))) == []


def test_no_teacher_answers_for_what_it_was_trained_on():
    """A copy that goes to another fold than its text is answered by a teacher that knows the text."""
    ids = [f"r{row}" for row in range(10)]
    copies = [f"{name}~{copy}" for copy in (1, 2) for name in ids]
    folds = folds_of(ids, ids, 3)
    assert sorted(np.bincount(folds).tolist()) == [3, 3, 4]
    assert folds_of(copies, ids, 3).tolist() == [*folds, *folds]
    rows = Dataset.from_dict({"id": ids, "label": [0.0] * 10})
    answered = []
    for fold in range(3):
        seen = without_fold(Splits(None, rows, rows), fold, 3)
        own = rows_of_fold(Dataset.from_dict({"id": copies}), ids, fold, 3)["id"][:]
        assert not {name.partition("~")[0] for name in own} & set(seen.train["id"])
        assert len(seen.train) + len(own) // 2 == 10
        answered += own
    assert sorted(answered) == sorted(copies)


def test_the_answers_for_the_folds_are_put_together():
    """Logits beside the ids of another fold would teach every row something else."""
    joined = joined_logits([taught(["b"], [2.0]), taught(["a", "c"], [1.0, 3.0])])
    rows = joined.attach(Dataset.from_dict({"id": ["a", "b", "c"]}))
    assert rows["teacher_logits"][:] == [[1.0], [2.0], [3.0]]
    config = configure(STUDY, PLACES, "sst2", "dry-augmented", {})
    teachers = teachers_of(Work("sst2", "kd-lora", 0, config, parts=Parts(folds=3)))
    assert [one.fold for one in teachers] == [(0, 3), (1, 3), (2, 3)]
    assert len({one.key for one in teachers} | {Work("sst2", "fft", 0, config).key}) == 4
