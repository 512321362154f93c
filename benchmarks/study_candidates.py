"""Where the parts of a recipe that are still candidates take hold of a training; each has a file of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from candidate_averaging import LastEpochs, MovingAverage
from candidate_relations import Features, RelationTransfer
from candidate_sad import SpectralAlignment
from study_plan import Work
from torch import Tensor
from transformers import TrainerCallback


def callbacks_of(
    work: Work, features: Callable[[], Features], bases: Callable[[], Mapping[str, Tensor]]
) -> list[TrainerCallback]:
    """List what takes hold of a training; where there is any, an interrupted training has to start anew.

    Args:
        work: the training.
        features: gives the teacher's, where they are wanted.
        bases: gives the directions for the adapters, where they are wanted.
    """
    found: list[TrainerCallback] = []
    parts = work.parts.read_by(work.arm)
    if "relations" in parts:
        found.append(RelationTransfer(features(), parts["relations"]))
    if "sad" in parts:
        found.append(SpectralAlignment(bases(), parts["sad"]))
    if "average" in parts:
        found.append(LastEpochs(parts["average"]))
    if "ema" in parts:
        found.append(MovingAverage(parts["ema"]))
    return found
