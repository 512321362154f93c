"""Two processes on two cores against one process that is pinned to one core.

    python benchmarks/two_processes.py --models DIR --glue DIR [--rows 800]

Trains all-MiniLM-L6-v2 (full and with adapters) and a two-layer BERT on MRPC through the command line: once as
`taskset -c 0 kdlora run`, once as two processes by `torchrun`, with half of the batch each, so that both take the same
optimiser steps. The figure is the record's rows per second of the training loop, data included, evaluation excluded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from harness import command_line, tell_machine

from kdlora.evidence.records import ExperimentLayout, read_record

ARMS = ("fft", "lora", "student-fft", "kd-lora")
BATCH = 32


def write_config(options: argparse.Namespace, batch: int, place: Path) -> Path:
    """Write a config of one epoch."""
    train = {"epochs": 1, "batch_size": batch}
    values = {
        "task": {"name": "mrpc"},
        "data": {"path": str(options.glue.resolve()), "max_train_examples": options.rows},
        "teacher": {"model": str((options.models / "minilm-l6").resolve()), "train": train},
        "student": {"model": str((options.models / "bert-tiny").resolve()), "train": train},
        "run": {"arms": options.arms, "seeds": [0], "threads": 1, "precision": options.precision},
        "export": {"formats": [], "benchmark": False},
    }
    place.write_text(yaml.safe_dump(values), encoding="utf-8")
    return place


def speeds(command: list[str], folder: Path, arms: list[str]) -> dict[str, float]:
    """Run a command, and give the rows per second of each arm."""
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    layout = ExperimentLayout(folder)
    return {arm: read_record(layout.run(arm, 0).record).examples_per_second or 0.0 for arm in arms}


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    found: dict[str, list[dict[str, float]]] = {"one": [], "two": []}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        one, two = (write_config(options, BATCH // n, folder / f"{n}.yaml") for n in (1, 2))
        for turn in range(options.rounds):
            pinned = ["taskset", "-c", "0", sys.executable, "-m", "kdlora", "run", str(one)]
            found["one"].append(speeds(pinned, folder / f"one-{turn}", options.arms))
            together = [*launcher, "-m", "kdlora", "run", str(two)]
            found["two"].append(speeds(together, folder / f"two-{turn}", options.arms))
    for arm in options.arms:
        alone, both = (max(turn[arm] for turn in found[key]) for key in ("one", "two"))
        print(f"{arm:12} one process {alone:7.1f} rows/s, two {both:7.1f} rows/s: {both / alone:.2f} times")
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    main(parser.parse_args())
