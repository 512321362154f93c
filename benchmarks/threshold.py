"""What one threshold for all labels, fitted on validation rows, is worth on test rows, against 0.5.

    python benchmarks/threshold.py OUT/runs/few/clinc28-tail/students ...

Reads the stored predictions of experiments of several labels a text; nothing is trained. Means and standard deviations
are over seeds.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from harness import command_line, markdown

from kdlora.data.tasks import Task
from kdlora.evidence.metrics import compute_metrics, fit_shift
from kdlora.evidence.predictions import Predictions
from kdlora.evidence.stats import mean_sd
from kdlora.report.collect import load_experiment
from kdlora.report.wording import plus_minus


def figures(task: Task, of: Predictions) -> list[float]:
    """Score, macro F1, both at 0.5 and by the threshold, the gain and the threshold."""
    seen, tested = of.only("validation"), of.only("test")
    shift, _ = fit_shift(task, seen.logits, seen.labels)
    found = [compute_metrics(task, tested.logits - by, tested.labels) for by in (0.0, shift)]
    scores = [100 * one[name] for name in (task.metrics[0], "macro_f1") for one in found]
    return [*scores, scores[1] - scores[0], 1 / (1 + np.exp(-shift))]


def main() -> int:
    """Print a row for each arm of each experiment."""
    parser = command_line(__doc__)
    parser.add_argument("experiments", nargs="+", type=Path)
    lines = []
    for folder in parser.parse_args().experiments:
        experiment = load_experiment(folder)
        for arm in experiment.arms:
            runs = [figures(experiment.task, run.predictions) for run in experiment.finished(arm) if run.predictions]
            *scores, gain, threshold = [mean_sd(list(column)) for column in zip(*runs, strict=True)]
            told = [*map(plus_minus, scores), f"{gain.mean:+.1f}", f"{threshold.mean:.2f}"]
            lines.append((folder.parent.name, folder.name, arm, *told))
    columns = ("score at 0.5", "fitted", "macro F1 at 0.5", "fitted", "gain", "threshold")
    print(markdown(("set", "experiment", "arm", *columns), lines, texts=3))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
