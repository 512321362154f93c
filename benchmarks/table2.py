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
from kdlora.errors import ConfigError
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
    """What is known of a family: parameters by method (and rank), peak bytes by precision and method, and times."""

    plain: tuple[ParameterCounts, ParameterCounts]
    adapted: dict[str, list[ParameterCounts]]
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    timing: dict[str, Timing] = field(default_factory=dict)

    def count(self, method: str) -> ParameterCounts:
        """Give the parameters at the measured rank."""
        return self.plain[0] if method == "FFT" else self.adapted[method][0]

    def resting_bytes(self, method: str) -> int:
        """Compute what fp32 weights and Adam's two moments take: 4 bytes a parameter, 8 more a trained one."""
        counts = self.count(method)
        return 4 * (counts.total + counts.adapter) + 8 * counts.trainable

    def seconds(self, name: str) -> float | None:
        """Give the mean inference time in fp32."""
        timing = self.timing.get("fp32")
        return None if timing is None else statistics.mean(timing.seconds[name])


Results = dict[str, Figures]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--families", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cpu", choices=list(DEFAULTS))
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps; the second has Adam's state")
    parser.add_argument("--seed", type=int, default=0, help="of weights and ids")
    parser.add_argument("--runs", type=int, help="timed passes (default: 3; on CUDA 100, as in the paper)")
    parser.add_argument("--every", type=int, help="time one of so many batches (default: 8; on CUDA 1, all)")
    parser.add_argument("--out", type=Path, help="also write the tables to this file, after every family")
    options = parser.parse_args(arguments)
    try:
        options.precision, options.reason = resolve_precision("auto", options.device)
    except ConfigError as fault:
        parser.error(str(fault))
    runs, every = DEFAULTS[options.device]
    options.runs, options.every = options.runs or runs, options.every or every
    return options


def count_family(family: str) -> Figures:
    """Count the parameters of teacher and student at every rank."""
    teacher, student = SIZES[family]
    adapted = {"LoRA": teacher, "KD-LoRA": student}
    return Figures(
        (count(teacher), count(student)),
        {name: [count(size, rank) for rank in RANKS] for name, size in adapted.items()},
    )


def measure_family(family: str, figures: Figures, conditions: Conditions) -> None:
    """Fill in memory and time in one precision."""
    teacher, student = SIZES[family]
    batch = widest_batch(lengths_of(TRAIN_COUNTS))
    peaks = figures.memory.setdefault(conditions.precision, {})
    for method in METHODS:
        size = student if method == "KD-LoRA" else teacher
        _, peaks[method] = run_in_child(train_steps, size, method, batch, conditions)
        _tell(f"{size.title}, {method}, {conditions.precision}: peak {peaks[method]} bytes")
    figures.timing[conditions.precision] = run_in_child(time_methods, (teacher, student), conditions)
    _tell(f"{family}, {conditions.precision}: {figures.timing[conditions.precision].seconds}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def render(results: Results, options: argparse.Namespace) -> str:
    """Write the whole page."""
    sections = (parameters_section, memory_section, time_section)
    texts = (one(results) for one in sections)
    return "\n\n".join(["# Table 2 at real size", conditions_text(results, options), *texts])


def conditions_text(results: Results, options: argparse.Namespace) -> str:
    """Say how and on what the figures were taken."""
    timings = [timing for figures in results.values() for timing in figures.timing.values()]
    batch = padded_tokens(widest_batch(lengths_of(TRAIN_COUNTS)))
    made = {**describe_machine(), **collect_versions(), **git_state(Path(__file__).parent)}
    counter = "CUDA's allocator" if options.device == "cuda" else "the process, above its level after imports"
    lines = [
        "Random weights at the published sizes, random token ids with the lengths of CoLA's sentences, two labels.",
        f"**Memory:** {options.steps} optimiser steps (AdamW, batch {BATCH}) on the widest batch of an epoch "
        f"({batch} tokens with padding), in a process of its own each; peak of {counter}.",
        f"**Time:** one warm-up and {options.runs} timed run(s) over one of {options.every} batches of {BATCH} rows"
        " of like length, scaled by tokens; methods take turns in one process; tokenising left out."
        + _warning(timings, options.device),
        f"**Precision:** fp32 as in the paper, and kdlora's default here: {options.precision}, as {options.reason}.",
        f"**Device:** {options.device}, {', '.join(str(timing.threads) for timing in timings[:1])} thread(s). "
        + "; ".join(f"{key}: {value}" for key, value in made.items()),
        f"**Date:** {datetime.datetime.now(datetime.UTC):%Y-%m-%d}. A dash is a figure not measured.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _warning(timings: list[Timing], device: str) -> str:
    """Say where the times are longer than the machine needs."""
    least = min((timing.occupied for timing in timings), default=1.0)
    if device == "cuda" or least >= MOSTLY_OURS:
        return ""
    had = f"the timed passes had as little as {least:.0%} of their threads"
    return f" **Others used the CPU too ({had}): these times are too long.**"


def _title(family: str, name: str) -> str:
    """Name the model that a method trains or runs."""
    return SIZES[family][name.startswith("KD-LoRA")].title


def _slashed(values: Iterable[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def _saving(before: float | None, after: float | None) -> str:
    """Say how much smaller a figure is; a larger one shows as a negative saving."""
    return "–" if before is None or after is None or not before else f"{100 * (1 - after / before):.1f}%"


def _precisions(results: Results) -> list[str]:
    return list(dict.fromkeys(name for figures in results.values() for name in (*figures.memory, *figures.timing)))


def parameters_section(results: Results) -> str:
    """Write trainable and total parameters beside the paper's."""
    rows = []
    for family, figures in results.items():
        paper = COSTS[family]
        full = f"{figures.plain[0].trainable / 1e6:.2f}"
        rows.append((_title(family, "FFT"), "FFT", full, "all", f"{paper['fft'].trainable[0] / 1e6:.0f}"))
        for method, published in (("LoRA", paper["lora"].trainable), ("KD-LoRA", paper["kd-lora"].trainable)):
            ours = _slashed((counts.adapter / 1e6 for counts in figures.adapted[method]), 3)
            head = f"{figures.count(method).head / 1e6:.3f}"
            theirs = _slashed((value / 1e6 for value in published), 1)
            rows.append((_title(family, method), method, ours, head, theirs))
    totals = [
        (
            " → ".join(size.title for size in SIZES[family]),
            " → ".join(f"{counts.total / 1e6:.2f}" for counts in figures.plain),
            _saving(figures.plain[0].total, figures.plain[1].total),
            " → ".join(f"{COSTS[family][arm].total / 1e6:.0f}" for arm in ("fft", "kd-lora")),
        )
        for family, figures in results.items()
    ]
    trainable = markdown(("model", "method", f"rank {_slashed(RANKS, 0)}", "head, trained too", "paper"), rows, 2)
    whole = markdown(("pair", "parameters in all", "fewer (claimed 40%)", "as published with the models"), totals)
    return (
        f"## Parameters, in millions\n\nTrainable:\n\n{trainable}\n\nIn all, adapters merged, with the head:\n\n{whole}"
    )


def memory_section(results: Results) -> str:
    """Write peak memory of training beside the paper's."""
    precisions = _precisions(results)
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
    precisions = _precisions(results)
    rows = []
    for family, figures in results.items():
        fft, lora, student = (one.seconds for one in COSTS[family].values())
        paper = {"FFT": fft, "LoRA": lora, "KD-LoRA, merged": student}
        for name in TIMED:
            cells = [_spread(figures.timing.get(precision), name) for precision in precisions]
            less = [_saving(figures.seconds("FFT"), figures.seconds(name)), _saving(fft, paper.get(name))]
            published = f"{paper[name]:.2f}" if name in paper else "–"
            rows.append((_title(family, name), name, *cells, less[0], published, less[1]))
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
    taken = {key: getattr(options, key) for key in ("device", "seed", "steps", "runs", "every")}
    for precision in dict.fromkeys(("fp32", options.precision)):  # the paper's first: it is the one to compare
        for family in options.families:
            measure_family(family, results[family], replace(Conditions(**taken), precision=precision))
            if options.out is not None:
                write_text_atomic(options.out, render(results, options) + "\n")
    print(render(results, options))


if __name__ == "__main__":
    main()
