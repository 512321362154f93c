"""How long a user waits before anything happens: `--help`, `validate`, the first step of a training.

    python benchmarks/start_up.py --models DIR --glue DIR [--rounds 3]

Whole commands in processes of their own, the median of the rounds. The first step is that of a student on MRPC with
stored logits, from the start of the process: imports, data, fork server, teacher evaluation left out by a table.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from harness import command_line, tell_machine

FIRST_STEP = """
import contextlib, time
from kdlora.cli import experiments, main

def listen(stage, event):
    if getattr(event, "step", 0) or getattr(event, "steps", 0):
        print(time.time(), flush=True)
        raise KeyboardInterrupt

experiments.live_progress = lambda: contextlib.nullcontext(listen)
main()
"""


def seconds_of(command: list[str]) -> float:
    """Time one command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def seconds_to_first_step(options: argparse.Namespace, folder: Path) -> float:
    """Time from the start of the command to the first progress of its training."""
    values = {
        "task.name": "mrpc",
        "data.path": options.glue,
        "teacher.logits": folder / "logits.parquet",
        "student.model": options.models / options.student,
        "run.arms": "[kd-lora]",
        "run.seeds": "[0]",
        "export.formats": "[]",
    }
    given = [part for key, value in values.items() for part in ("--set", f"{key}={value}")]
    start = time.time()
    command = [sys.executable, "-c", FIRST_STEP, "run", "--out", tempfile.mkdtemp(dir=folder), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout.strip():
        sys.exit(done.stderr[-2000:])
    return float(done.stdout.split()[-1]) - start


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    program = str(Path(sys.executable).with_name("kdlora"))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = folder / "config.yaml"
        model = options.models / options.student
        both = f"teacher: {{model: {model}}}\nstudent: {{model: {model}}}\n"
        config.write_text(f"task: {{name: mrpc}}\ndata: {{path: {options.glue}}}\n{both}")
        values = np.random.default_rng(0).normal(size=(2, 4000)).astype(np.float32)
        table = {"id": [str(row) for row in range(4000)], "not_equivalent": values[0], "equivalent": values[1]}
        pd.DataFrame(table).to_parquet(folder / "logits.parquet")
        calls: list[tuple[str, float, Callable[[], float]]] = [
            ("kdlora --help", 0.3, lambda: seconds_of([program, "--help"])),
            ("kdlora validate", 1.0, lambda: seconds_of([program, "validate", str(config)])),
            ("kdlora run, until the first step", math.inf, lambda: seconds_to_first_step(options, folder)),
        ]
        for name, goal, call in calls:
            call()
            median = statistics.median(call() for _ in range(options.rounds))
            print(f"{name}: {median:.2f} s ({'met' if median <= goal else 'MISSED'}: under {goal:g} s)", flush=True)
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("--student", default="minilm-l6")
    parser.add_argument("--rounds", type=int, default=3)
    main(parser.parse_args())
