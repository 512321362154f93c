"""What a run of a suite costs beside its training, and how far an estimate is off.

    python benchmarks/suite_overhead.py --suite SUITE_FOLDER
    python benchmarks/suite_overhead.py --models DIR --glue DIR [--runs 6]

With a suite's folder: from its records, by arm, the seconds from a run's first to its last second. With models: carries
out a small suite (MRPC, all-MiniLM-L6-v2 teaches a two-layer BERT) and times each job from the outside, fork and record
included. Both less training, and less evaluation: the validations, the final scores and the latency.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any

from kdlora.evidence.records import RunRecord, read_record
from kdlora.experiment.jobs import Outcome
from kdlora.experiment.suite import SuiteEvent, run_suite
from kdlora.experiment.suitefile import build_suite
from kdlora.system.environment import collect_versions, describe_machine


def from_records(folder: Path) -> dict[str, list[float]]:
    """Give the seconds beside training and evaluation of every finished run, by arm."""
    found: dict[str, list[float]] = defaultdict(list)
    for path in sorted((folder / "runs").rglob("run.json")):
        record = read_record(path)
        if record.status == "finished" and record.train_seconds is not None:
            found[record.arm].append(_whole(record) - _busy(record))
    return found


def _busy(record: RunRecord) -> float:
    return (record.train_seconds or 0.0) + (record.evaluation_seconds or 0.0)


def _whole(record: RunRecord) -> float:
    return (datetime.fromisoformat(record.finished) - datetime.fromisoformat(record.started)).total_seconds()


def from_outside(models: Path, glue: Path, runs: int) -> dict[str, list[float]]:
    """Carry out a suite and give the seconds beside training and evaluation of each job, by arm, but for the first."""
    values: dict[str, Any] = {
        "name": "overhead",
        "tasks": ["mrpc"],
        "families": {
            "small": {
                "teacher": {"model": str(models / "minilm-l6"), "train": {"epochs": 1}},
                "student": {"model": str(models / "bert-tiny"), "train": {"epochs": 1}},
            }
        },
        "config": {"data": {"path": str(glue), "max_train_examples": 500}, "run": {"threads": 1}},
        "arms": ["fft", "kd-lora", "student-lora"],
        "seeds": list(range(runs)),
    }
    found: dict[str, list[float]] = defaultdict(list)
    ended: list[Outcome] = []

    def listen(event: SuiteEvent) -> None:
        if isinstance(event.detail, Outcome) and event.detail.record is not None:
            ended.append(event.detail)

    with tempfile.TemporaryDirectory() as folder:
        run_suite(build_suite(values), Path(folder) / "suite", listen=listen)
    for outcome in ended[1:]:
        assert outcome.record is not None
        found[outcome.record.arm].append(outcome.seconds - _busy(outcome.record))
    return found


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.suite is not None:
        found = from_records(options.suite)
    else:
        found = from_outside(options.models, options.glue, options.runs)
    for arm, values in found.items():
        print(f"{arm:14} n {len(values):4}  median {statistics.median(values):.2f} s  most {max(values):.2f} s")
    print(json.dumps({"machine": describe_machine(), "versions": collect_versions()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--runs", type=int, default=6)
    main(parser.parse_args())
