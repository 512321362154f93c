"""What a run of a suite costs beside its training: its seconds less those of training and evaluation, by arm.

    python benchmarks/suite_overhead.py --models DIR --glue DIR [--runs 6]

Carries out a small suite (MRPC, all-MiniLM-L6-v2 teaches a two-layer BERT), and reads the records, from a run's first
to its last second. Evaluation, which is apart, are the validations, the final scores and the latency.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from datetime import datetime

from harness import command_line, tell_machine

from kdlora import run_suite
from kdlora.experiment.suitefile import build_suite


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    names = {"teacher": "minilm-l6", "student": "bert-tiny"}
    models = {side: {"model": str(options.models / name), "train": {"epochs": 1}} for side, name in names.items()}
    data = {"path": str(options.glue), "max_train_examples": 500}
    values = {
        "name": "overhead",
        "tasks": ["mrpc"],
        "families": {"small": models},
        "config": {"data": data, "run": {"threads": 1}},
        "arms": ["fft", "kd-lora", "student-lora"],
        "seeds": list(range(options.runs)),
    }
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        records = run_suite(build_suite(values), folder + "/suite").records.values()
    for record in sorted(records, key=lambda one: one.started)[1:]:  # the first one imports
        whole = datetime.fromisoformat(record.finished) - datetime.fromisoformat(record.started)
        busy = (record.train_seconds or 0.0) + (record.evaluation_seconds or 0.0)
        found[record.arm].append(whole.total_seconds() - busy)
    for arm, seconds in found.items():
        print(f"{arm:14} n {len(seconds):4}  median {statistics.median(seconds):.2f} s  most {max(seconds):.2f} s")
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("--runs", type=int, default=6)
    main(parser.parse_args())
