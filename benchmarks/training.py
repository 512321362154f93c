"""Training speed and memory against what a user would run instead, both sides in one go.

    python benchmarks/training.py --models DIR --glue DIR [--pairs mpnet-base:minilm-l6 ...] [--seconds 20] [--rounds 2]

`--models` holds the encoders of the pairs. Every figure is a process of its own that trains for a bounded time; the
rounds are interleaved, and the median of each variant counts. End to end, with the labelling of the teacher and three
epochs, is computed from the measured rates: `rows / labelling + 3 * rows / training` on our side, `3 * rows / online`
on the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from harness import command_line, in_process, markdown, tell_machine

EPOCHS = 3
SIDES = ("ours", "ours: default recipe", "stock", "stock, online teacher", "ours: labelling")
MEASURED = {
    "cola": (*SIDES, "stock bf16", "stock, padded to 512", "ours: teacher", "stock: teacher"),
    "mrpc": (*SIDES, "stock bf16"),
    "long": SIDES,
    "wide": ("ours", "ours: LoRA on the teacher"),
}
Figures = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Goal:
    """A ratio that we want to reach, of `speed` or `end to end` at least, of `memory` at most."""

    name: str
    task: str
    goal: float
    other: str
    figure: str = "speed"
    ours: str = "ours"


ONLINE = "online teacher, 3 epochs with labelling"
GOALS = (
    *(Goal("stock Trainer, fp32, no teacher", *one, "stock") for one in (("cola", 4.0), ("mrpc", 2.5), ("long", 1.8))),
    *(Goal("stock Trainer, bf16, no teacher", *one, "stock bf16") for one in (("cola", 2.8), ("mrpc", 1.8))),
    *(Goal(ONLINE, task, 4.0, "stock, online teacher", "end to end") for task in ("cola", "mrpc", "long")),
    Goal("padded to 512", "cola", 300.0, "stock, padded to 512"),
    Goal("teacher fine-tuning, stock fp32", "cola", 1.7, "stock: teacher", ours="ours: teacher"),
    Goal("memory, % of LoRA on the teacher", "wide", 40.0, "ours: LoRA on the teacher", "memory"),
)


def measure(options: argparse.Namespace, pair: str) -> Figures:
    """Run every variant of a pair in turns, the median of each."""
    models = dict(zip(("teacher", "student"), (str(options.models / name) for name in pair.split(":")), strict=True))
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    wanted = [(task, variant) for task in options.tasks for variant in MEASURED[task]]
    for task, variant in wanted * options.rounds:
        work = {"variant": variant, "task": task, "glue": str(options.glue), "seconds": options.seconds, **models}
        result = in_process(Path(__file__).with_name("training_variants.py"), work)
        print(f"{pair} {task:5} {variant:26} {result['rows_per_second']:9.1f} rows/s", flush=True)
        found[task, variant].append(result)
    return {key: {name: statistics.median(r[name] for r in all_) for name in all_[0]} for key, all_ in found.items()}


def ratio(goal: Goal, found: Figures) -> float | None:
    """Compute what a goal is about; None where it was not measured."""
    if (goal.task, goal.ours) not in found or (goal.task, goal.other) not in found:
        return None
    ours, other = found[goal.task, goal.ours], found[goal.task, goal.other]
    if goal.figure == "memory":
        return 100 * ours["peak_memory_bytes"] / other["peak_memory_bytes"]
    if goal.figure == "speed":
        return ours["rows_per_second"] / other["rows_per_second"]
    labelling = found[goal.task, "ours: labelling"]["rows_per_second"]
    return (EPOCHS / other["rows_per_second"]) / (EPOCHS / ours["rows_per_second"] + 1 / labelling)


def show(pair: str, found: Figures) -> None:
    """Print the figures of a pair, and what they say about the goals."""
    rows = [
        (*key, f"{one['rows_per_second']:,.1f}", f"{one['peak_memory_bytes'] / 1e6:,.0f}") for key, one in found.items()
    ]
    print(f"\n{pair}\n\n" + markdown(("data", "variant", "rows/s", "peak memory, MB"), rows, 2))
    verdicts = []
    for goal in GOALS:
        if (value := ratio(goal, found)) is not None:
            good = value <= goal.goal if goal.figure == "memory" else value >= goal.goal
            verdicts.append((goal.name, goal.task, f"{value:.2f}", f"{goal.goal:g}", "met" if good else "MISSED"))
    print("\n" + markdown(("against", "data", "ratio", "goal", ""), verdicts, 2))


def main(options: argparse.Namespace) -> None:
    """Measure, print, and keep the figures where asked."""
    everything = {}
    for pair in options.pairs:
        found = measure(options, pair)
        show(pair, found)
        everything[pair] = {f"{task}: {variant}": figures for (task, variant), figures in found.items()}
    tell_machine()
    if options.out:
        options.out.write_text(json.dumps(everything, indent=2), encoding="utf-8")


if __name__ == "__main__":
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("--pairs", nargs="+", default=["mpnet-base:minilm-l6", "minilm-l6:bert-tiny"])
    parser.add_argument("--tasks", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
