"""The paper's Table 2 at real size: parameters, memory of training, time of inference, beside the paper's figures.

    python benchmarks/table2.py [--families bert roberta deberta-v3] [--device cpu|cuda] [--out FILE]

None of these depends on trained weights, so the six models are built at their published sizes with random ones, and
fed random token ids of the lengths of CoLA's sentences: nothing is downloaded. Memory is that of the widest batch of
an epoch, each figure from a training in a process of its own. One thread of a CPU needs ten minutes or more.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from harness import command_line, markdown
from table2_measure import METHODS, RANK, TIMED, Conditions, Timing, time_methods, train_steps
from table2_models import BATCH, SIZES, TRAIN_COUNTS, count, lengths_of, padded_tokens, widest_batch

from kdlora.distil.precision import resolve_precision
from kdlora.models.adapters import ParameterCounts
from kdlora.report.paper import COSTS
from kdlora.system.children import run_in_child
from kdlora.system.environment import collect_versions, describe_machine, git_state
from kdlora.system.storage import write_text_atomic

RANKS = (8, 16, 32, 64)
DEFAULTS = {"cpu": (3, 8), "cuda": (100, 1)}
"""Timed runs, and of how many batches one is run: a CPU would need hours for what a GPU does in a minute."""
MOSTLY_OURS = 0.9
"""Share of its threads that a timed pass must have had."""


@dataclass
class Figures:
    """What is known of a family: parameters by method and rank, peak bytes by precision and method, and times."""

    counts: dict[str, list[ParameterCounts]]
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    timing: dict[str, Timing] = field(default_factory=dict)

    def resting_bytes(self, method: str) -> int:
        """Compute what fp32 weights and Adam's two moments take: 4 bytes a parameter, 8 more a trained one."""
        counts = self.counts[method][0]
        return 4 * (counts.total + counts.adapter) + 8 * counts.trainable


Results = dict[str, Figures]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cpu", choices=list(DEFAULTS))
    parser.add_argument("--runs", type=int, help="timed passes (default: 3; on CUDA 100, as in the paper)")
    parser.add_argument("--every", type=int, help="time one of so many batches (default: 8; on CUDA 1, all)")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    options = parser.parse_args(arguments)
    options.precision, options.reason = resolve_precision("auto", options.device)
    runs, every = DEFAULTS[options.device]
    options.runs, options.every = options.runs or runs, options.every or every
    return options


def count_family(family: str) -> Figures:
    """Count the parameters of teacher and student; the adapters' at every rank."""
    teacher, student = SIZES[family]
    adapted = {"LoRA": teacher, "KD-LoRA": student}
    counts = {name: [count(size, rank) for rank in RANKS] for name, size in adapted.items()}
    return Figures({"FFT": [count(teacher)], **counts})


def measure_family(family: str, figures: Figures, conditions: Conditions) -> None:
    """Fill in memory and time in one precision."""
    teacher, student = SIZES[family]
    batch = widest_batch(lengths_of(TRAIN_COUNTS))
    peaks = figures.memory.setdefault(conditions.precision, {})
    for method in METHODS:
        size = student if method == "KD-LoRA" else teacher
        _, peaks[method] = run_in_child(train_steps, size, method, batch, conditions)
    figures.timing[conditions.precision] = run_in_child(time_methods, (teacher, student), conditions)
    seconds = figures.timing[conditions.precision].seconds
    print(f"{family}, {conditions.precision}: {peaks} bytes, {seconds}", file=sys.stderr, flush=True)


def render(results: Results, options: argparse.Namespace) -> str:
    """Write the whole page."""
    texts = (section(results) for section in (parameters_section, memory_section, time_section))
    return "\n\n".join(["# Table 2 at real size", conditions_text(results, options), *texts])


def conditions_text(results: Results, options: argparse.Namespace) -> str:
    """Say how and on what the figures were taken."""
    timings = [timing for figures in results.values() for timing in figures.timing.values()]
    least = min((timing.occupied for timing in timings), default=1.0)
    warning = (
        f" **Others used the CPU too (the timed passes had as little as {least:.0%} of their threads): too long.**"
    )
    batch = padded_tokens(widest_batch(lengths_of(TRAIN_COUNTS)))
    made = {**describe_machine(), **collect_versions(), **git_state(Path(__file__).parent)}
    counter = "CUDA's allocator" if options.device == "cuda" else "the process, above its level after imports"
    lines = [
        "Random weights at the published sizes, random token ids with the lengths of CoLA's sentences, two labels.",
        f"**Memory:** {Conditions.steps} optimiser steps (AdamW, batch {BATCH}) on the widest batch of an epoch "
        f"({batch} tokens with padding), in a process of its own each; peak of {counter}.",
        f"**Time:** one warm-up and {options.runs} timed run(s) over one of {options.every} batches of {BATCH} rows"
        " of like length, scaled by tokens; methods take turns in one process; tokenising left out."
        + (warning if options.device == "cpu" and least < MOSTLY_OURS else ""),
        f"**Precision:** fp32 as in the paper, and kdlora's default here: {options.precision}, as {options.reason}.",
        f"**Device:** {options.device}, {', '.join(str(timing.threads) for timing in timings[:1])} thread(s). "
        + "; ".join(f"{key}: {value}" for key, value in made.items()),
        f"**Date:** {datetime.datetime.now(datetime.UTC):%Y-%m-%d}. A dash is a figure not measured.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _title(family: str, name: str) -> str:
    return SIZES[family][name.startswith("KD-LoRA")].title


def _millions(values: Iterable[float], digits: int, between: str = " / ") -> str:
    return between.join(f"{value / 1e6:.{digits}f}" for value in values)


def _saving(before: float | None, after: float | None) -> str:
    """Say how much smaller a figure is; a larger one shows as a negative saving."""
    return "–" if before is None or after is None else f"{100 * (1 - after / before):.1f}%"


def parameters_section(results: Results) -> str:
    """Write trainable and total parameters beside the paper's."""
    rows, totals = [], []
    for family, figures in results.items():
        paper, full = COSTS[family], figures.counts["FFT"][0]
        published = _millions(paper["fft"].trainable[:1], 0)
        rows.append((_title(family, "FFT"), "FFT", _millions([full.trainable], 2), "all", published))
        for method, by_rank in (("LoRA", paper["lora"].trainable), ("KD-LoRA", paper["kd-lora"].trainable)):
            counts = figures.counts[method]
            ours, head = _millions((one.adapter for one in counts), 3), _millions([counts[0].head], 3)
            rows.append((_title(family, method), method, ours, head, _millions(by_rank, 1)))
        total = (full.total, figures.counts["KD-LoRA"][0].total)
        pair = " → ".join(size.title for size in SIZES[family])
        published = _millions((paper[arm].total for arm in ("fft", "kd-lora")), 0, " → ")
        totals.append((pair, _millions(total, 2, " → "), _saving(*total), published))
    ranks = " / ".join(map(str, RANKS))
    trainable = markdown(("model", "method", f"rank {ranks}", "head, trained too", "paper"), rows, 2)
    whole = markdown(("pair", "parameters in all", "fewer (claimed 40%)", "as published with the models"), totals)
    return (
        f"## Parameters, in millions\n\nTrainable:\n\n{trainable}\n\nIn all, adapters merged, with the head:\n\n{whole}"
    )


def memory_section(results: Results) -> str:
    """Write peak memory of training beside the paper's."""
    precisions = list(dict.fromkeys(name for figures in results.values() for name in figures.memory))
    rows = []
    for family, figures in results.items():
        for method, published in zip(METHODS, COSTS[family].values(), strict=True):
            peaks = [figures.memory.get(precision, {}).get(method) for precision in precisions]
            cells = ["–" if peak is None else f"{peak / 1e6:.0f}" for peak in (*peaks, figures.resting_bytes(method))]
            rows.append((_title(family, method), method, *cells, f"{published.memory_mb:.1f}"))
    header = ("model", "method", *(f"peak, {name}" for name in precisions), "weights and Adam, computed", "paper")
    return f"## Memory of training at rank {RANK}, in MB (10⁶ bytes)\n\n{markdown(header, rows, 2)}"


def time_section(results: Results) -> str:
    """Write inference time beside the paper's, which times LoRA with the adapters beside the weights."""
    precisions = list(dict.fromkeys(name for figures in results.values() for name in figures.timing))
    rows = []
    for family, figures in results.items():
        fft, lora, student = (one.seconds for one in COSTS[family].values())
        paper = {"FFT": fft, "LoRA": lora, "KD-LoRA, merged": student}
        fp32 = {name: statistics.mean(one) for name, one in figures.timing["fp32"].seconds.items()}
        for name in TIMED:
            cells = [_spread(figures.timing.get(precision), name) for precision in precisions]
            published = f"{paper[name]:.2f}" if name in paper else "–"
            less = [_saving(fp32["FFT"], fp32[name]), published, _saving(fft, paper.get(name))]
            rows.append((_title(family, name), name, *cells, *less))
    header = ("model", "method", *precisions, "less than FFT, fp32", "paper", "less than FFT, paper")
    title = "## Inference over CoLA's validation set (1,043 sentences), in seconds, mean ± sd over runs"
    return f"{title}\n\n{markdown(header, rows, 2)}"


def _spread(timing: Timing | None, name: str) -> str:
    if timing is None:
        return "–"
    values = timing.seconds[name]
    digits = 3 if statistics.mean(values) < 5 else 1  # a GPU needs well under a second, a CPU's thread a minute
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def main(arguments: list[str] | None = None) -> None:
    """Count, measure, print."""
    options = parse(arguments)
    results = {family: count_family(family) for family in options.families}
    taken = Conditions(device=options.device, runs=options.runs, every=options.every)
    for precision in dict.fromkeys(("fp32", options.precision)):  # the paper's first: it is the one to compare
        for family in options.families:
            measure_family(family, results[family], replace(taken, precision=precision))
    text = render(results, options)
    print(text)
    if options.out is not None:
        write_text_atomic(options.out, text + "\n")


if __name__ == "__main__":
    main()
