"""Write the texts on which a student and its teacher differ most, and as many texts drawn at random.

    python benchmarks/hard.py --run OUT/runs/films/sst2-1000/once --texts OUT/data/sst2-1000/unlabelled.csv

`hard.csv` and `random.csv` are written beside the texts, each with a quarter of them. How much two answers differ is
the divergence of the student's probabilities from the teacher's, KL(teacher || student).
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from harness import command_line
from scipy.special import rel_entr, softmax

from kdlora import Classifier
from kdlora.evidence.records import ExperimentLayout

SHARE = 0.25


def main() -> int:
    """Write both files, and print how far student and teacher are apart on each."""
    parser = command_line(__doc__, "run", "texts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    layout, table = ExperimentLayout(options.run), pd.read_csv(options.texts, dtype=str, keep_default_na=False)
    rows = table.to_numpy()
    texts = list(rows[:, 0]) if rows.shape[1] == 1 else [tuple(row) for row in rows]
    teacher, student = (Classifier.load(folder) for folder in (layout.teacher, layout.student))
    if teacher.label_names != student.label_names:
        raise SystemExit("teacher and student have other labels, or another order of them")
    expected, given = (softmax(one.predict_logits(texts).astype(float), axis=-1) for one in (teacher, student))
    apart = rel_entr(expected, given).sum(axis=-1)
    number = round(SHARE * len(table))
    chosen = {
        "hard": np.argsort(-apart, kind="stable")[:number],
        "random": np.random.default_rng(options.seed).choice(len(table), number, replace=False),
    }
    for name, index in chosen.items():
        table.iloc[np.sort(index)].to_csv(options.texts.with_name(f"{name}.csv"), index=False)
        same = (expected[index].argmax(-1) == given[index].argmax(-1)).mean()
        print(json.dumps({name: number, "divergence": round(apart[index].mean(), 4), "same_label": round(same, 4)}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
