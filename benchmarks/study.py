"""Compare recipes for the student: recipes x tasks x seeds, in resumable pieces.

    python benchmarks/study.py benchmarks/studies/small.yaml --models DIR --glue DIR --out DIR [--minutes 30]
    python benchmarks/study.py benchmarks/studies/small.yaml --models DIR --glue DIR --out DIR --report

`--models` holds the encoders that the study names, and `vader`. Every recipe's hyperparameters are tuned alike, for
each of its arms, on a part of the training rows; the validation rows are for the reported scores alone. Every
training is recorded as it ends, and none is done twice. With `--minutes` the command stops between two trainings when
the time is over, with exit code 75 if work is left.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

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


def next_work(study: Study, places: Places, scores: dict[str, float]) -> Iterator[Work]:
    """Give what is still to be done, in the plan's order; `scores` grows as it is done."""
    for step in study.steps:
        for recipe in step.recipes:
            for arm in study.recipes[recipe].arms:
                point, missing = choose_point(study, places, recipe, arm, scores)
                for work in missing:
                    yield from _with_teacher(work, scores)
                if point is None:
                    point, _ = choose_point(study, places, recipe, arm, scores)
                assert point is not None  # the search was just carried out
                for work in reported_work(study, places, recipe, arm, point, step):
                    yield from _with_teacher(work, scores)


def _with_teacher(work: Work, scores: dict[str, float]) -> Iterator[Work]:
    if work.arm in DISTILLED_ARMS and teacher_of(work).key not in scores:
        yield teacher_of(work)
    if work.key not in scores:
        yield work


def run(study: Study, places: Places, minutes: float) -> int:
    """Work until all is done or the time is over; return the exit code."""
    from study_runs import carry_out, prepare, read_scores, write_tables

    end = time.monotonic() + 60 * minutes
    prepare()
    write_tables(study, places)
    scores = read_scores(places)
    print(f"{len(scores)} trainings are recorded", flush=True)
    for work in next_work(study, places, scores):
        if time.monotonic() > end:
            print("the time is over; run the same command again to go on", flush=True)
            return UNFINISHED
        begun = time.monotonic()
        record = carry_out(work, places)
        scores[work.key] = record["score"]
        what = "search" if work.held_out else f"seed {work.seed}"
        print(
            f"{work.task:7} {work.arm:12} {what:7} score {record['score']:6.2f}  "
            f"{record['examples_per_second']:7.0f} rows/s  {time.monotonic() - begun:5.0f} s  {work.key}",
            flush=True,
        )
    print("all is done", flush=True)
    return 0


def main(options: argparse.Namespace) -> int:
    """Run or report a study."""
    study = read_study(options.study)
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
    parser.add_argument("--draws", type=int, default=10_000)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(read_options()))
