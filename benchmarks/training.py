"""Training speed and memory against what a user would run instead, both sides in one go.

    python benchmarks/training.py --models DIR --glue DIR [--pairs mpnet-base:minilm-l6 ...] [--seconds 20] [--rounds 2]

`--models` holds the encoders of the pairs. Every figure is a process of its own that trains for a bounded time; the
rounds are interleaved, and the median of each variant counts. End to end, with the labelling of the teacher and three
epochs, is computed from the measured rates: `rows / labelling + 3 * rows / training` on our side, `3 * rows / online`
on the other.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kdlora.system.environment import collect_versions, describe_machine

EPOCHS = 3
MEASURED = {
    "cola": (
        "ours",
        "ours: default recipe",
        "stock",
        "stock bf16",
        "stock, online teacher",
        "stock, padded to 512",
        "txtai, online teacher",
        "ours: labelling",
    ),
    "mrpc": ("ours", "ours: default recipe", "stock", "stock bf16", "stock, online teacher", "ours: labelling"),
    "long": ("ours", "ours: default recipe", "stock", "stock, online teacher", "ours: labelling"),
    "wide": ("ours", "ours: LoRA on the teacher"),
}
TEACHER = ("ours: teacher", "stock: teacher")
NEEDS = {"txtai, online teacher": "txtai"}
"""Packages of variants that are left out where they are not installed."""
Figures = dict[tuple[str, str], dict[str, float]]


@dataclass(frozen=True)
class Goal:
    """A ratio that we want to reach.

    Attributes:
        name: what is compared.
        task: on which data.
        at_least: the ratio.
        figure: `rows_per_second` of `ours` over that of `other`, or `end to end`, or `memory` (then at most).
        ours: variant of ours.
        other: the variant that it is compared with.
    """

    name: str
    task: str
    goal: float
    ours: str
    other: str
    figure: str = "speed"


GOALS = (
    Goal("stock Trainer, fp32, no teacher", "cola", 4.0, "ours", "stock"),
    Goal("stock Trainer, fp32, no teacher", "mrpc", 2.5, "ours", "stock"),
    Goal("stock Trainer, fp32, no teacher", "long", 1.8, "ours", "stock"),
    Goal("stock Trainer, bf16, no teacher", "cola", 2.8, "ours", "stock bf16"),
    Goal("stock Trainer, bf16, no teacher", "mrpc", 1.8, "ours", "stock bf16"),
    Goal("online teacher, 3 epochs with labelling", "cola", 4.0, "ours", "stock, online teacher", "end to end"),
    Goal("online teacher, 3 epochs with labelling", "mrpc", 4.0, "ours", "stock, online teacher", "end to end"),
    Goal("online teacher, 3 epochs with labelling", "long", 4.0, "ours", "stock, online teacher", "end to end"),
    Goal("txtai with a teacher, 3 epochs with labelling", "cola", 3.0, "ours", "txtai, online teacher", "end to end"),
    Goal("padded to 512", "cola", 300.0, "ours", "stock, padded to 512"),
    Goal("teacher fine-tuning, stock fp32", "cola", 1.7, "ours: teacher", "stock: teacher"),
    Goal("memory, % of LoRA on the teacher", "wide", 40.0, "ours", "ours: LoRA on the teacher", "memory"),
)


def measure(options: argparse.Namespace, pair: str) -> Figures:
    """Run every variant of a pair in turns."""
    teacher, student = pair.split(":")
    wanted = [(task, variant) for task in options.tasks for variant in MEASURED[task] if _is_there(variant)]
    wanted += [("cola", variant) for variant in TEACHER if "cola" in options.tasks]
    found: dict[tuple[str, str], list[dict[str, float]]] = defaultdict(list)
    for _ in range(options.rounds):
        for task, variant in wanted:
            work = {
                "variant": variant,
                "task": task,
                "teacher": str(options.models / teacher),
                "student": str(options.models / student),
                "glue": str(options.glue),
                "seconds": options.seconds,
            }
            result = _in_process(work)
            print(f"{pair} {task:5} {variant:26} {result['rows_per_second']:9.1f} rows/s", flush=True)
            found[task, variant].append(result)
    return {
        key: {name: statistics.median(r[name] for r in rounds) for name in rounds[0]} for key, rounds in found.items()
    }


def _is_there(variant: str) -> bool:
    package = NEEDS.get(variant)
    if package is None or importlib.util.find_spec(package) is not None:
        return True
    print(f"{variant}: left out, for it needs {package}: pip install {package}", flush=True)
    return False


def _in_process(work: dict[str, Any]) -> dict[str, float]:
    script = Path(__file__).with_name("training_variants.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(work)], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{work['variant']} on {work['task']} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


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
    console = Console(width=120)
    table = Table("data", "variant", "rows/s", "peak memory, MB", title=pair)
    for (task, variant), figures in found.items():
        table.add_row(task, variant, f"{figures['rows_per_second']:.1f}", f"{figures['peak_memory_bytes'] / 1e6:,.0f}")
    console.print(table)
    verdicts = Table("against", "data", "ratio", "goal", "")
    for goal in GOALS:
        value = ratio(goal, found)
        if value is not None:
            good = value <= goal.goal if goal.figure == "memory" else value >= goal.goal
            verdicts.add_row(goal.name, goal.task, f"{value:.2f}", f"{goal.goal:g}", "met" if good else "MISSED")
    console.print(verdicts)


def main(options: argparse.Namespace) -> None:
    """Measure, print, and keep the figures where asked."""
    everything = {}
    for pair in options.pairs:
        found = measure(options, pair)
        show(pair, found)
        everything[pair] = {f"{task}: {variant}": figures for (task, variant), figures in found.items()}
    print(json.dumps({"machine": describe_machine(), "versions": collect_versions()}))
    if options.out:
        options.out.write_text(json.dumps(everything, indent=2), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--glue", type=Path, required=True)
    parser.add_argument("--pairs", nargs="+", default=["mpnet-base:minilm-l6", "minilm-l6:bert-tiny"])
    parser.add_argument("--tasks", nargs="+", default=list(MEASURED), choices=list(MEASURED))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    main(parser.parse_args())
