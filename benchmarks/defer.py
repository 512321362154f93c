"""What may be promised, and what it costs: finished experiments, judged on rows that chose nothing.

    python benchmarks/defer.py EXPERIMENT ... [--error 0.02] [--splits 1000] [--keep FILE.json]

Reads the stored predictions of experiments with a test split (such as those of `strangers.py`); nothing is trained. A
random half of the test rows promises, and all of them judge. Every arm and kind of sureness meets the same halves.
`answered` is the largest share of the test rows of which at most --error are wrong, `promised` what was promised of it.
The cascade's threshold is chosen on validation, and scored on test. Two lines compare `kd-lora` with its control by
probability: the mean error over the coverages and `answered`, means of the experiments, 95% over rows and seeds.

A value has no probability. Of regressions a table says how far the half of the test rows is off whose error should be
smallest, by that of the validation rows with the nearest values, and by the distance from the teacher's value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from harness import command_line, markdown
from sklearn.neighbors import KNeighborsRegressor

from kdlora.evidence.defer import (
    SURENESS,
    NoPromiseError,
    area_under_risk,
    measure_sureness,
    promise_error,
    risk_coverage,
)
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.evidence.stats import estimate

WITHIN = 0.2
"""Points below the teacher that count as being as good."""
_PAIR = ("kd-lora", "student-lora")


@dataclass(frozen=True)
class Judged:
    """One run's validation and test rows."""

    experiment: str
    arm: str
    seed: int
    seen: Predictions
    tested: Predictions


def collect(folder: Path, kind: str = "single-label") -> Iterator[Judged]:
    """Read the finished runs of an experiment, if it is of this kind."""
    layout = ExperimentLayout(folder)
    for record in read_results(layout.results):
        file = layout.run(record.arm, record.seed).predictions
        if record.status == "finished" and record.task["kind"] == kind and file.exists():
            found = read_predictions(file)
            seen, tested = found.only("validation"), found.only("test")
            if len(tested.ids):
                yield Judged(str(folder), record.arm, record.seed, seen, tested)


def judge(rows: Predictions, how: Any) -> tuple[np.ndarray, np.ndarray]:
    """Say how sure the model is of each row, and whether it is wrong."""
    return measure_sureness(rows.logits, how), rows.logits.argmax(axis=1) != rows.labels


def promise(run: Judged, how: Any, error: float, splits: int) -> dict[str, Any]:
    """Promise on random halves, and see how often the other half breaks it, and how much is answered."""
    other, (sure, wrong) = judge(run.seen, how), judge(run.tested, how)
    draw, kept, broken = np.random.default_rng(0), [], []
    for _ in range(splits):
        order = draw.permutation(len(sure))
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
        broken.append(False)
        try:
            found = promise_error(sure[first], wrong[first], other=other, error=error, how=how)
        except NoPromiseError:
            kept.append(0.0)
            continue
        kept.append(float(np.mean(sure[second] >= found.threshold)))
        broken[-1] = bool(wrong[sure >= found.threshold].mean() > error)
    return {
        "coverage": float(np.mean(kept)),
        "promised": float(np.mean(np.array(kept) > 0)),
        "broken": float(np.mean(broken)),  # of all test rows, for which the threshold stands
        "area": area_under_risk(sure, wrong),
        "answered": answered_share(sure, wrong, error),
    }


def answered_share(sure: np.ndarray, wrong: np.ndarray, error: float) -> float:
    """Give the largest share of rows of which at most `error` are wrong."""
    coverage, risk = risk_coverage(sure, wrong)
    return float(max(np.append(0, coverage[risk <= error])))


def cascade(student: Judged, teacher: Judged) -> dict[str, Any]:
    """Choose on validation the fewest texts to hand on for the teacher's accuracy, and score that on test."""
    thresholds = np.append(np.quantile(judge(student.seen, "probability")[0], np.arange(0, 1, 0.01)), np.inf)
    rows = [
        [_mixed(student_rows, teacher_rows, threshold) for threshold in thresholds]
        for student_rows, teacher_rows in ((student.seen, teacher.seen), (student.tested, teacher.tested))
    ]
    goal = rows[0][-1][1] - WITHIN
    place = next(place for place, (_, score) in enumerate(rows[0]) if score >= goal)
    best = next(share for share, score in rows[1] if score >= rows[1][-1][1] - WITHIN)
    share, score = rows[1][place]
    return {
        "handed_on": share,
        "score": score,
        "teacher": rows[1][-1][1],
        "student": rows[1][0][1],
        "fewest_on_test": best,
    }


def _mixed(small: Predictions, large: Predictions, threshold: float) -> tuple[float, float]:
    passed = judge(small, "probability")[0] < threshold
    said = np.where(passed, large.logits.argmax(axis=1), small.logits.argmax(axis=1))
    return float(passed.mean()), 100 * float(np.mean(said == small.labels))


def sum_up(lines: list[dict[str, Any]]) -> str:
    """Give the mean error over the coverages, and what is answered by probability, in percent; means over the seeds."""
    columns = [*((how, "area") for how in SURENESS), ("probability", "answered"), ("probability", "coverage")]
    found: dict[tuple[str, str], dict[tuple[str, str], list[float]]] = {}
    for line in lines:
        if "area" in line:
            of_arm = found.setdefault((line["experiment"], line["arm"]), {column: [] for column in columns})
            for how, what in columns:
                if how == line["sureness"]:
                    of_arm[how, what].append(100 * line[what])
    rows = [(*place, *(f"{np.mean(values):.1f}" for values in of_arm.values())) for place, of_arm in found.items()]
    return markdown(("experiment", "arm", *SURENESS, "answered", "promised"), rows)


def gain(
    experiments: Sequence[Sequence[Judged]], measure: Callable[..., float] = area_under_risk, draws: int = 1_000
) -> str:
    """Compare the distilled student with its control, in points."""
    found, examples = [], 0
    for runs in experiments:
        first, second = (
            {run.seed: judge(run.tested, "probability") for run in runs if run.arm == arm} for arm in _PAIR
        )
        pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
        if pairs:
            count, draw = len(pairs[0][0][0]), np.random.default_rng(0)
            drawn = [np.mean(_gains(pairs, draw.integers(0, count, count), measure)) for _ in range(draws)]
            found.append((_gains(pairs, np.arange(count), measure), np.array(drawn)))
            examples += count
    if not found:
        return "no experiment has both kd-lora and student-lora"
    one = estimate(found, examples, 0.95)
    return (
        f"{one.difference:+.2f} points ({one.low:+.2f} to {one.high:+.2f}; {len(found)} experiments, "
        f"at least {one.n_seeds} seeds)"
    )


def _gains(pairs: Sequence[Any], rows: np.ndarray, measure: Callable[..., float]) -> np.ndarray:
    """Give each seed's difference on some rows, in points."""
    values = [[measure(sure[rows], wrong[rows]) for sure, wrong in pair] for pair in pairs]
    return 100 * -np.diff(values, axis=1)[:, 0]


def regressions(folder: Path) -> Iterator[tuple[str, ...]]:
    """Give each arm's mean absolute error on all test rows, and on the half of least expected error; means of seeds."""
    runs = list(collect(folder, "regression"))
    teachers, rows = {run.seed: run.tested.logits[:, 0] for run in runs if run.arm == "fft"}, dict[str, list[Any]]()
    for run in runs:
        if run.seed in teachers:
            seen, off = (np.abs(part.logits[:, 0] - part.labels) for part in (run.seen, run.tested))
            near = (
                KNeighborsRegressor(min(len(seen), max(10, len(seen) // 10)))
                .fit(run.seen.logits, seen)
                .predict(run.tested.logits)
            )
            guesses = (near, np.abs(run.tested.logits[:, 0] - teachers[run.seed]))
            halves = [off[np.argsort(guess, kind="stable")[: len(off) // 2]].mean() for guess in guesses]
            rows.setdefault(run.arm, []).append([off.mean(), *halves])
    for arm, found in rows.items():
        yield str(folder), arm, *(f"{value:.2f}" for value in np.mean(found, axis=0))


def main() -> None:
    """Judge every experiment, print the tables, keep the figures."""
    parser = command_line(__doc__)
    parser.add_argument("experiments", nargs="+", type=Path)
    parser.add_argument("--error", type=float, default=0.02)
    parser.add_argument("--splits", type=int, default=1_000)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    lines: list[dict[str, Any]] = []
    experiments = [list(collect(folder)) for folder in options.experiments]
    for folder, runs in zip(options.experiments, experiments, strict=True):
        teachers = {run.seed: run for run in runs if run.arm == "fft"}
        for run in runs:
            place = {"experiment": str(folder), "arm": run.arm, "seed": run.seed}
            for how in SURENESS:
                found = promise(run, how, options.error, options.splits if how == "probability" else 100)
                lines.append(place | {"sureness": how} | found)
            if run.arm in _PAIR and teachers:
                taught = teachers.get(run.seed, next(iter(teachers.values())))
                lines.append(place | {"cascade": cascade(run, taught)})
    for line in lines:
        print(json.dumps(line), flush=True)
    print(sum_up(lines))
    print("kd-lora - student-lora, mean error over the coverages:", gain(experiments))
    answered = gain(experiments, partial(answered_share, error=options.error))
    print(f"kd-lora - student-lora, answered with {options.error:.1%} wrong:", answered)
    header = ("experiment", "arm", "mean error", "half by neighbours", "half by the teacher")
    print(markdown(header, [row for folder in options.experiments for row in regressions(folder)]))
    if options.keep is not None:
        options.keep.write_text(json.dumps({"error": options.error, "figures": lines}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
