"""The candidates for a better recipe: each does what its paper says, and the key of its work says that it did."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from candidate_averaging import LastEpochs, MovingAverage
from study_plan import NO_PARTS, Places, Work, configure, read_study

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
