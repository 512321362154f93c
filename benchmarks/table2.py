"""The paper's Table 2 at real size: parameters, memory of training, time of inference, beside the paper's figures.

    python benchmarks/table2.py [--families bert roberta deberta-v3] [--device cpu|cuda] [--out FILE]

None of these depends on trained weights, so the six models are built at their published sizes with random ones, and
fed random token ids of the lengths of CoLA's sentences: nothing is downloaded. Memory is that of the widest batch of
an epoch, each figure from a training in a process of its own. One thread of a CPU needs ten minutes or more.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from pathlib import Path

import torch
from table2_lengths import TRAIN_COUNTS, VALIDATION_COUNTS, lengths_of
from table2_measure import METHODS, Conditions, Timing, batches_to_run, peak_of_training, time_inference
from table2_models import BATCH, SIZES, Size, count_adapted, count_plain, padded_tokens, widest_batch
from table2_text import (
    MEASURED_RANK,
    RANKS,
    Figures,
    claims_section,
    memory_section,
    notes_section,
    parameters_section,
    time_section,
)

from kdlora.distil.precision import resolve_precision
from kdlora.errors import ConfigError
from kdlora.system.environment import collect_versions, describe_machine, git_state
from kdlora.system.storage import write_text_atomic

DEFAULTS = {"cpu": (3, 8), "cuda": (100, 1)}
"""Timed runs, and of how many batches one is run: a CPU would need hours for what a GPU does in a minute."""

MOSTLY_OURS = 0.9
"""Share of its threads that a timed pass must have had."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line.

    Args:
        arguments: in place of the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--device", default="cpu", choices=list(DEFAULTS))
    parser.add_argument(
        "--steps", type=_positive, default=2, help="optimiser steps; the second has Adam's state (default: 2)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of weights and ids; the largest peak counts (default: 0)"
    )
    parser.add_argument("--runs", type=_positive, help="timed passes (default: 3; on CUDA 100, as in the paper)")
    parser.add_argument("--every", type=_positive, help="time one of so many batches (default: 8; on CUDA 1, all)")
    parser.add_argument(
        "--out", type=Path, help="also write the tables to this file, anew whenever a family is measured"
    )
    options = parser.parse_args(arguments)
    try:
        options.precision, options.reason = resolve_precision("auto", options.device)
    except ConfigError as fault:
        parser.error(str(fault))
    runs, every = DEFAULTS[options.device]
    options.runs, options.every = options.runs or runs, options.every or every
    return options


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return value


def count_family(sizes: tuple[Size, Size]) -> Figures:
    """Count the parameters of teacher and student at every rank.

    Args:
        sizes: of teacher and student.
    """
    adapted = {
        method: {rank: count_adapted(size, rank) for rank in RANKS}
        for method, size in zip(METHODS[1:], sizes, strict=True)
    }
    return Figures((count_plain(sizes[0]), count_plain(sizes[1])), adapted)


def measure_family(sizes: tuple[Size, Size], figures: Figures, precision: str, options: argparse.Namespace) -> None:
    """Fill in memory and time in one precision.

    Args:
        sizes: of teacher and student.
        figures: what is known; it is added to.
        precision: `fp32`, `bf16` or `fp16`.
        options: from `parse`.
    """
    batch = widest_batch(lengths_of(TRAIN_COUNTS))
    conditions = [Conditions(precision, options.device, MEASURED_RANK, seed) for seed in options.seeds]
    peaks = figures.memory.setdefault(precision, {})
    for method in METHODS:
        size = sizes[1 if method == "KD-LoRA" else 0]
        found = [peak_of_training(size, method, batch, options.steps, condition) for condition in conditions]
        peaks[method] = max((peak for peak in found if peak is not None), default=None)
        _tell(f"{size.title}, {method}, {precision}: peak {peaks[method]} bytes")
    lengths = lengths_of(VALIDATION_COUNTS)
    figures.timing[precision] = time_inference(sizes, lengths, options.runs, options.every, conditions[0])
    _tell(f"{sizes[0].title}, {sizes[1].title}, {precision}: {figures.timing[precision].seconds}")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def render(results: dict[str, Figures], options: argparse.Namespace) -> str:
    """Write the whole page.

    Args:
        results: family to figures.
        options: from `parse`.
    """
    sections = (parameters_section, memory_section, time_section, claims_section, notes_section)
    return "\n".join(
        ["# Table 2 at real size\n", conditions_text(results, options), *(one(results) for one in sections)]
    )


def conditions_text(results: dict[str, Figures], options: argparse.Namespace) -> str:
    """Say how and on what the figures were taken.

    Args:
        results: family to figures.
        options: from `parse`.
    """
    batch = widest_batch(lengths_of(TRAIN_COUNTS))
    taken, share = batches_to_run(lengths_of(VALIDATION_COUNTS), options.every)
    timings = [timing for figures in results.values() for timing in figures.timing.values()]
    threads = {timing.threads for timing in timings}
    place = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {_join(threads)} thread(s)"
    whole = "all batches" if options.every == 1 else f"{len(taken)} of its batches ({share:.0%} of the tokens), scaled"
    counter = "CUDA's allocator" if options.device == "cuda" else "the process, above its level after imports"
    lines = [
        "Random weights at the published sizes, random token ids with the lengths of CoLA's sentences, two labels.",
        f"**Memory:** {options.steps} optimiser steps (AdamW, batch {BATCH}) on the widest batch of an epoch "
        f"({padded_tokens(batch)} tokens with padding), in a process of its own each; peak of {counter}; "
        f"seed(s) {_join(options.seeds)}.",
        f"**Time:** one warm-up and {options.runs} timed run(s) over {whole}, batches of {BATCH} sentences of like "
        "length; the methods take turns in one process; tokenising left out. A dash is a figure not measured."
        + _warning(timings, options.device),
        f"**Precision:** fp32 as in the paper, and kdlora's default here: {options.precision}, as {options.reason}.",
        f"**Device:** {place}. " + "; ".join(f"{key}: {value}" for key, value in _machine().items()) + ".",
        "**Versions:** " + ", ".join(f"{name} {value}" for name, value in collect_versions().items()) + ".",
        f"**Date:** {datetime.datetime.now(datetime.UTC):%Y-%m-%d}{_commit()}.",
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n"


def _join(values: set[int] | list[int]) -> str:
    return ", ".join(str(value) for value in sorted(values)) or "–"


def _warning(timings: list[Timing], device: str) -> str:
    """Say where the times are longer than the machine needs."""
    least = min((timing.occupied for timing in timings), default=1.0)
    if device == "cuda" or least >= MOSTLY_OURS:
        return ""
    had = f"the timed passes had as little as {least:.0%} of their threads"
    return f" **Others used the CPU too ({had}): these times are too long.**"


def _machine() -> dict[str, str]:
    """Describe the machine, and how busy it was: times from a shared one are worth less."""
    load = {"load over 15 minutes": f"{os.getloadavg()[2]:.1f}"} if hasattr(os, "getloadavg") else {}
    return {**describe_machine(), **load}


def _commit() -> str:
    state = git_state(Path(__file__).parent)
    dirty = " with changes" if state.get("dirty") == "yes" else ""
    return f", commit {state['commit'][:10]}{dirty}" if state else ""


def main(arguments: list[str] | None = None) -> None:
    """Count, measure, print.

    Args:
        arguments: in place of the process's own.
    """
    options = parse(arguments)
    results = {family: count_family(SIZES[family]) for family in options.families}
    for precision in dict.fromkeys(("fp32", options.precision)):  # the paper's first: it is the one to compare
        for family in options.families:
            measure_family(SIZES[family], results[family], precision, options)
            if options.out is not None:
                write_text_atomic(options.out, render(results, options))
    print(render(results, options))


if __name__ == "__main__":
    main()
