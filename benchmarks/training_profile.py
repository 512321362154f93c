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
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from training_variants import Work, ours
from transformers import TrainerCallback

WARM_UP = 40
SHOWN = 14


class Steps(TrainerCallback):
    """Profiles, or times, some steps after the warm-up, and ends the training."""

    def __init__(self, steps: int, profiler: torch.profiler.profile | None) -> None:
        """Take what is measured with."""
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
    plain = Steps(options.steps, None)
    ours(work, [plain], options.recipe)
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    seen = Steps(options.steps, profiler)
    ours(work, [seen], options.recipe)
    operations = sorted(profiler.key_averages(), key=lambda one: -one.self_cpu_time_total)
    total = 1e6 * seen.seconds
    known = sum(one.self_cpu_time_total for one in operations)
    rate = options.steps / plain.seconds
    title = f"{options.pair}, {options.task}, {options.recipe}: {rate:.1f} steps/s"
    table = Table("operation", "share", "calls a step", title=title)
    for one in operations[:SHOWN]:
        table.add_row(one.key, f"{100 * one.self_cpu_time_total / total:.1f}%", f"{one.count / options.steps:.1f}")
    rest = sum(one.self_cpu_time_total for one in operations[SHOWN:])
    table.add_row(f"{len(operations) - SHOWN} other operations", f"{100 * rest / total:.1f}%", "")
    table.add_row("between operations", f"{100 * (total - known) / total:.1f}%", "")
    Console(width=100).print(table)
    print(f"with the profiler the steps took {seen.seconds / plain.seconds:.2f} times as long")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--pair", default="mpnet-base:minilm-l6")
    parser.add_argument("--task", default="cola", choices=("cola", "mrpc", "long", "wide"))
    parser.add_argument("--recipe", default="paper", choices=("paper", "default"))
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args())
