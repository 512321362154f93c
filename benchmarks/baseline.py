"""The baseline that later work has to beat: the paper's recipe on four GLUE tasks with models at hand.

    python benchmarks/baseline.py --models DIR --glue DIR --out DIR [--tasks mrpc cola ...] [--seeds 0 1 2]

`--models` holds `minilm-l6` (the teacher) and `bert-tiny` (the student). The command resumes; it prints a table of
all finished tasks at its end.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from kdlora import build_config, run_experiment
from kdlora.evidence.records import RunRecord

ARMS = ("fft", "lora", "kd-lora", "student-lora", "student-fft")
TASKS = {"mrpc": None, "cola": None, "stsb": None, "sst2": 8000}
"""Task and number of training rows; None is all of them."""


def run_task(task: str, options: argparse.Namespace) -> list[RunRecord]:
    """Run one task's experiment, or read what is finished."""
    config = build_config(
        {
            "recipe": "paper",
            "task": {"name": task},
            "data": {"path": str(options.glue), "max_train_examples": TASKS[task]},
            "teacher": {"model": str(options.models / "minilm-l6"), "train": {"learning_rate": 5e-5}},
            "student": {"model": str(options.models / "bert-tiny"), "full_learning_rate": 3e-4},
            "run": {"arms": ARMS, "seeds": options.seeds},
        }
    )
    return run_experiment(config, options.out / task).records


def print_table(results: dict[str, list[RunRecord]]) -> None:
    """Print mean ± sd over seeds, a row per arm."""
    print("| arm | " + " | ".join(results) + " |\n|---|" + "---|" * len(results))
    for arm in ARMS:
        cells = [
            _cell([run.score for run in runs if run.arm == arm and run.score is not None]) for runs in results.values()
        ]
        print(f"| `{arm}` | " + " | ".join(cells) + " |")


def _cell(scores: list[float]) -> str:
    if not scores:
        return "–"
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread} (n = {len(scores)})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    arguments = parser.parse_args()
    print_table({task: run_task(task, arguments) for task in arguments.tasks})
