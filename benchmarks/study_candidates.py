"""Where the parts of a recipe that are still candidates take hold of a training; each has a file of its own."""

from __future__ import annotations

from candidate_averaging import LastEpochs, MovingAverage
from study_plan import Parts
from transformers import TrainerCallback


def callbacks_of(parts: Parts) -> list[TrainerCallback]:
    """List what listens to a training; where there is any, an interrupted training has to start anew."""
    found: list[TrainerCallback] = []
    if parts.average:
        found.append(LastEpochs(parts.average))
    if parts.ema is not None:
        found.append(MovingAverage(parts.ema))
    return found
