"""What a model knows of rare classes: its mean F1 on test, by how many training rows a class has.

    python benchmarks/rare.py OUT/runs/small/banking77-tail/now ... [--most 5 10 20 50]

Reads the stored predictions of experiments of one label a text; nothing is trained. Means are over classes and seeds.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from harness import command_line, markdown
from sklearn.metrics import f1_score

from kdlora.evidence.metrics import predict_labels
from kdlora.report.collect import load_experiment


def main() -> int:
    """Print a row for each arm of each experiment."""
    parser = command_line(__doc__)
    parser.add_argument("experiments", nargs="+", type=Path)
    parser.add_argument("--most", nargs="+", type=int, default=[5, 10, 20, 50], help="rows, where a group ends")
    options = parser.parse_args()
    lines = []
    for folder in options.experiments:
        experiment = load_experiment(folder)
        task, plan = experiment.task, json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        group = np.digitize([plan["labels"][name] for name in task.label_names], options.most, right=True)
        for arm in experiment.arms:
            found = [run.predictions.only("test") for run in experiment.finished(arm) if run.predictions]
            said = [(one.labels, predict_labels(task, one.logits)) for one in found]
            of_class = np.mean(
                [f1_score(*pair, labels=range(task.num_labels), average=None, zero_division=0) for pair in said], axis=0
            )
            means = [100 * of_class[group == number].mean() for number in range(len(options.most) + 1)]
            lines.append((folder.name, arm, f"{100 * of_class.mean():.1f}", *(f"{mean:.0f}" for mean in means)))
    ends = [f"{first + 1} to {last}" for first, last in zip([0, *options.most], options.most, strict=False)]
    print(markdown(("experiment", "arm", "macro F1", *ends, "more"), lines, texts=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
