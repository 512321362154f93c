"""Cut a training off, save at a step, and compare what two trainings left bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback


class PowerCutError(Exception):
    """What no code expects."""


class CutAfter(TrainerCallback):
    """Raise after a step, before the session can save it."""

    def __init__(self, step: int, seen: list[int] | None = None) -> None:
        self.step = step
        self.seen = [] if seen is None else seen

    def on_step_end(self, args, state, control, **_):
        self.seen.append(state.global_step)
        if state.global_step == self.step:
            raise PowerCutError


def callback(event: str, act: Callable[..., object]) -> TrainerCallback:
    """Make a callback for one event of Trainer's, which gets the model and the optimiser by name."""
    return type("Own", (TrainerCallback,), {event: lambda self, args, state, control, **given: act(**given)})()


class SaveAt(TrainerCallback):
    """Save after given steps, as the clock would."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        if state.global_step in self.steps:
            control.should_save = True


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Keep the weights as they are now."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Compare weights."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def assert_resumes(make: Callable[[], Any], folder: Path, *saved: int, resumed: Any = None, **options: Any) -> None:
    """Check that a training that is cut off after a step goes on after the one that was saved, as if undisturbed.

    It is cut off once for each step in `saved`; `resumed` are options of the cut and the resumed training alone.
    """
    undisturbed = make()
    expected = undisturbed.run(folder / "undisturbed", **options)
    options |= resumed or {}
    for step in saved:
        again, seen, place = make(), [], folder / f"cut-{step}"
        with pytest.raises(PowerCutError):
            make().run(place, callbacks=[SaveAt(step), CutAfter(11)], **options)
        assert [path.name for path in place.glob("step-*")] == [f"step-{step:09d}"]
        torch.manual_seed(12345)  # a new process has another random state
        outcome = again.run(place, callbacks=[CutAfter(-1, seen)], **options)
        assert seen[0] == step + 1, "the training started anew"
        assert_same_bits(weights(undisturbed.model), weights(again.model))
        assert outcome.history == expected.history
        assert (outcome.examples, outcome.steps) == (expected.examples, expected.steps)
        assert outcome.best_epoch == expected.best_epoch
