"""Compare recipes for the student: recipes x tasks x seeds, in resumable pieces.

    python benchmarks/study.py benchmarks/studies/small.yaml --models DIR --glue DIR --out DIR [--minutes 30]
    python benchmarks/study.py benchmarks/studies/small.yaml --models DIR --glue DIR --out DIR --report

`--models` holds the encoders that the study names, and `vader`. Every recipe's hyperparameters are tuned alike, for
each of its arms, on a part of the training rows; the validation rows are for the reported scores alone. Every
training is recorded as it ends, and none is done twice; several processes may share the work of one `--out`. With
`--minutes` the command stops between two trainings when the time is over, with exit code 75 if work is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from study_plan import (
    Places,
    Study,
    Work,
    choose_point,
    read_study,
    reported_work,
    teacher_of,
)

from kdlora.config import DISTILLED_ARMS

UNFINISHED = 75
"""The conventional exit code for a temporary failure: run the same command again."""


def ready_work(study: Study, places: Places, scores: dict[str, float]) -> Iterator[Work]:
    """Give what can be done now, in the plan's order: searches before what they choose, teachers before students.

    Args:
        study: the study.
        places: where things lie.
        scores: of finished trainings, by key.
    """
    for step in study.steps:
        for recipe in step.recipes:
            for arm in study.recipes[recipe].arms:
                point, missing = choose_point(study, places, recipe, arm, scores)
                if point is not None:
                    missing = [
                        work
                        for work in reported_work(study, places, recipe, arm, point, step)
                        if work.key not in scores
                    ]
                for work in missing:
                    teacher = teacher_of(work)
                    yield teacher if work.arm in DISTILLED_ARMS and teacher.key not in scores else work


def run(study: Study, places: Places, minutes: float) -> int:
    """Work until all is done or the time is over; return the exit code."""
    from study_runs import carry_out, claimed, prepare, read_scores, write_tables

    end = time.monotonic() + 60 * minutes
    prepare()
    write_tables(study, places)
    print(f"{len(read_scores(places))} trainings are recorded", flush=True)
    while time.monotonic() < end:
        waiting = False
        for work in ready_work(study, places, read_scores(places)):
            waiting = True
            with claimed(work, places) as is_ours:
                if is_ours:
                    _tell(carry_out(work, places))
                    break
        else:
            print("another process does what is left" if waiting else "all is done", flush=True)
            return UNFINISHED if waiting else 0
    print("the time is over; run the same command again to go on", flush=True)
    return UNFINISHED


def _tell(record: dict[str, Any]) -> None:
    what = "search" if record["held_out"] else f"seed {record['seed']}"
    print(
        f"{record['task']:7} {record['arm']:12} {what:7} score {record['score']:6.2f}  "
        f"{record['examples_per_second']:6.0f} rows/s  {record['train_seconds']:4.0f} s  {record['key']}",
        flush=True,
    )


def main(options: argparse.Namespace) -> int:
    """Run or report a study."""
    study = read_study(options.study, options.tasks)
    places = Places(options.models.resolve(), options.glue.resolve(), options.out.resolve())
    if options.report:
        from study_report import make_tables

        print(make_tables(study, places, options.draws))
        return 0
    return run(study, places, options.minutes)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--report", action="store_true", help="print the tables of what is finished, run nothing")
    parser.add_argument("--tasks", nargs="+", default=(), help="tasks that the tables are of, in place of the study's")
    parser.add_argument("--draws", type=int, default=2_000)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(read_options()))
