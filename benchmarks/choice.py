"""Which student arm should ship: finished experiments, chosen again and again on a few rows and judged on the others.

    python benchmarks/choice.py EXPERIMENT ... [--rows 150] [--splits 300]

Reads the stored predictions of experiments with a test split; nothing is trained. In each split, `--rows` of the test
rows stand for validation, and the others judge: the regret of a rule is how far the arm that it ships is below the best
arm on them, in points, as a mean over the splits. `product` is `kdlora.report.findings.choose_student`, `highest` ships
the best score, and an arm's own column is that of shipping it always. Seeds are as the experiment has them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from harness import command_line, markdown, tell_machine

from kdlora.config import STUDENT_ARMS
from kdlora.data.tasks import Task
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.report.collect import Run, load_experiment
from kdlora.report.findings import choose_student


def judge(task: Task, run: Run, rows: np.ndarray) -> Run:
    """The run as if these of its test rows were its validation split."""
    assert run.predictions is not None
    one = replace(run.predictions.only("test").take(rows), split=("validation",) * len(rows))
    found = score(task, compute_metrics(task, one.decided, one.labels, one.groups, one.offsets))
    return replace(run, predictions=one, record=run.record.model_copy(update={"score": found}))


def regrets(folder: Path, rows: int, splits: int) -> dict[str, float]:
    """Mean regret of each rule."""
    experiment = load_experiment(folder)
    task, runs = experiment.task, [run for arm in STUDENT_ARMS for run in experiment.finished(arm) if run.predictions]
    arms = list(dict.fromkeys(run.record.arm for run in runs))
    many, lost = len(runs[0].predictions.only("test").ids), []
    for split in range(splits):
        order = np.random.default_rng(split).permutation(many)
        seen, judged = ([judge(task, run, part) for run in runs] for part in (order[:rows], order[rows:]))

        def means(given: list[Run]) -> dict[str, float]:
            return {arm: np.mean([run.record.score for run in given if run.record.arm == arm]) for arm in arms}

        chosen, known, true = choose_student(task, seen), means(seen), means(judged)
        assert chosen is not None
        shipped = {"product": chosen.arm, "highest": max(known, key=known.__getitem__)} | {arm: arm for arm in arms}
        lost.append({rule: max(true.values()) - true[arm] for rule, arm in shipped.items()})
    return {rule: float(np.mean([one[rule] for one in lost])) for rule in lost[0]}


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("experiments", nargs="+", type=Path)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--splits", type=int, default=300)
    given = parser.parse_args()
    found = {str(folder): regrets(folder, given.rows, given.splits) for folder in given.experiments}
    rules = list(dict.fromkeys(rule for one in found.values() for rule in one))
    every = {rule: [one[rule] for one in found.values() if rule in one] for rule in rules}
    lines = [
        (Path(name).name, *(f"{one[rule]:.2f}" if rule in one else "–" for rule in rules))
        for name, one in found.items()
    ]
    tell_machine()
    print(
        markdown(["experiment", *rules], [*lines, ("mean", *(f"{np.mean(values):.2f}" for values in every.values()))])
    )
