"""Training speed and memory against what a user would run instead, both sides in one go.

    python benchmarks/training.py --models DIR --data SHARED [--pairs mpnet-base:minilm-l6 ...] [--tasks wnut17 ...]

`--models` holds the encoders of the pairs, `--data` the folders `glue` and `ner`. Every figure is a process of its own
that trains for a bounded time (`--seconds`); the `--rounds` are interleaved, and the median of each variant counts. End
to end, with the labelling of the teacher and three epochs, is computed from the measured rates: `rows / labelling + 3 *
rows / training` on our side, `3 * rows / online` on the other.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections import defaultdict
from pathlib import Path

from harness import command_line, in_process, markdown, tell_machine

EPOCHS = 3
SIDES = ("ours", "ours: default recipe", "stock", "stock, online teacher", "ours: labelling")
MEASURED = {
    "cola": (*SIDES, "stock bf16", "stock, padded to 512", "ours: teacher", "stock: teacher"),
    "mrpc": (*SIDES, "stock bf16"),
    "long": SIDES,
    "wide": ("ours", "ours: LoRA on the teacher"),
    "wnut17": (*SIDES[:3], "stock bf16"),
}
Figures = dict[tuple[str, str], dict[str, float]]


ONLINE = "online teacher, 3 epochs with labelling"
TEACHER_LORA = "ours: LoRA on the teacher"
GOALS: list[tuple[str, str, float, str, str, str]] = [
    *(
        ("stock Trainer, fp32, no teacher", *one, "speed", "stock", "ours")
        for one in (("cola", 4.0), ("mrpc", 2.5), ("wnut17", 2.5))
    ),
    ("stock Trainer, fp32, no teacher", "long", 1.8, "speed", "stock", "ours"),
    *(
        ("stock Trainer, bf16, no teacher", *one, "speed", "stock bf16", "ours")
        for one in (("cola", 2.8), ("mrpc", 1.8), ("wnut17", 2.5))
    ),
    *((ONLINE, task, 4.0, "end to end", "stock, online teacher", "ours") for task in ("cola", "mrpc", "long")),
    ("padded to 512", "cola", 300.0, "speed", "stock, padded to 512", "ours"),
    ("teacher fine-tuning, stock fp32", "cola", 1.7, "speed", "stock: teacher", "ours: teacher"),
    ("memory, % of LoRA on the teacher", "wide", 40.0, "memory", TEACHER_LORA, "ours"),
]
"""Name, data, ratio of `speed` or `end to end` at least or of `memory` at most, the other variant, ours."""


def measure(options: argparse.Namespace, pair: str) -> Figures:
    """Run every variant of a pair in turns, the median of each."""
    models = dict(zip(("teacher", "student"), (str(options.models / name) for name in pair.split(":")), strict=True))
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    wanted = [(task, variant) for task in options.tasks for variant in MEASURED[task]]
    for task, variant in wanted * options.rounds:
        work = {"variant": variant, "task": task, "data": str(options.data), "seconds": options.seconds, **models}
        result = in_process(Path(__file__).with_name("training_variants.py"), work)
        print(f"{pair} {task:5} {variant:26} {result['rows_per_second']:9.1f} rows/s", flush=True)
        found[task, variant].append(result)
    return {key: {name: statistics.median(r[name] for r in all_) for name in all_[0]} for key, all_ in found.items()}


def ratio(figure: str, ours: dict[str, float], other: dict[str, float], labelling: float) -> float:
    """Compute what a goal is about."""
    if figure == "memory":
        return 100 * ours["peak_memory_bytes"] / other["peak_memory_bytes"]
    own = EPOCHS / ours["rows_per_second"] + (1 / labelling if figure == "end to end" else 0.0)
    return (EPOCHS / other["rows_per_second"]) / own


def show(pair: str, found: Figures) -> None:
    """Print the figures of a pair, and what they say about the goals."""
    rows = [
        (*key, f"{one['rows_per_second']:,.1f}", f"{one['peak_memory_bytes'] / 1e6:,.0f}") for key, one in found.items()
    ]
    print(f"\n{pair}\n\n" + markdown(("data", "variant", "rows/s", "peak memory, MB"), rows, 2))
    verdicts = []
    for name, task, goal, figure, other, ours in GOALS:
        if (task, ours) in found and (task, other) in found:
            labelling = found.get((task, "ours: labelling"), {}).get("rows_per_second", math.inf)
            value = ratio(figure, found[task, ours], found[task, other], labelling)
            good = value <= goal if figure == "memory" else value >= goal
            verdicts.append((name, task, f"{value:.2f}", f"{goal:g}", "met" if good else "MISSED"))
    print("\n" + markdown(("against", "data", "ratio", "goal", ""), verdicts, 2))


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    for pair in options.pairs:
        show(pair, measure(options, pair))
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "data")
    parser.add_argument("--pairs", nargs="+", default=["mpnet-base:minilm-l6", "minilm-l6:bert-tiny"])
    parser.add_argument("--tasks", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    main(parser.parse_args())
