"""Where the time of our training step goes: operations of PyTorch by their own time, over some steps of a real run.

    python benchmarks/training_profile.py --models DIR --glue DIR [--pair TEACHER:STUDENT] [--task cola]
        [--recipe default] [--steps 60]

The first steps are left out: they plan shapes and pack weights. Shares are of the wall time of the profiled steps;
"between operations" is what the profile does not see: Python, the loader, the profiler itself. The same steps run once
without it, and the last line says how much it slows them down.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from harness import command_line, markdown
from training_variants import Work, ours
from transformers import TrainerCallback

WARM_UP = 40
SHOWN = 14


class Steps(TrainerCallback):
    """Profiles, or times, some steps after the warm-up, and ends the training."""

    def __init__(self, steps: int, profiler: torch.profiler.profile | None = None) -> None:
        self.steps, self.profiler = steps, profiler
        self.seconds = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin after the warm-up; end after so many steps."""
        if state.global_step == WARM_UP:
            if self.profiler is not None:
                self.profiler.start()
            self.seconds = -time.perf_counter()
        elif state.global_step == WARM_UP + self.steps:
            self.seconds += time.perf_counter()
            if self.profiler is not None:
                self.profiler.stop()
            control.should_training_stop = True


def main(options: argparse.Namespace) -> None:
    """Profile and print."""
    teacher, student = (str(options.models / name) for name in options.pair.split(":"))
    work = Work("ours", options.task, teacher, student, str(options.glue), seconds=600.0)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    plain, seen = Steps(options.steps), Steps(options.steps, profiler)
    for steps in (plain, seen):
        ours(work, recipe=options.recipe, callbacks=[steps])
    operations = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = 1e6 * seen.seconds
    shares = [100 * one.self_cpu_time_total / total for one in operations]
    rows = [
        (one.key, f"{share:.1f}%", f"{one.count / options.steps:.1f}")
        for one, share in zip(operations[:SHOWN], shares, strict=False)
    ]
    rows.append((f"{len(operations) - SHOWN} other operations", f"{sum(shares[SHOWN:]):.1f}%", ""))
    rows.append(("between operations", f"{100 - sum(shares):.1f}%", ""))
    print(f"{options.pair}, {options.task}, {options.recipe}: {options.steps / plain.seconds:.1f} steps/s\n")
    print(markdown(("operation", "share", "calls a step"), rows))
    print(f"\nwith the profiler the steps took {seen.seconds / plain.seconds:.2f} times as long")


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("--pair", default="mpnet-base:minilm-l6")
    parser.add_argument("--task", default="cola", choices=("cola", "mrpc", "long", "wide"))
    parser.add_argument("--recipe", default="paper", choices=("paper", "default"))
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args())
