"""Our Table 2 beside the paper's, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from table2_measure import METHODS, TIMED, Timing
from table2_models import SIZES

from kdlora.models.adapters import ParameterCounts
from kdlora.report.paper import COSTS, FAMILY_TITLES, claims

RANKS = (8, 16, 32, 64)
MEASURED_RANK = RANKS[0]

# Table 2's trainable parameters at ranks 16, 32 and 64, in millions; those at rank 8 are in `COSTS`.
_PAPER_HIGHER_RANKS = {
    "LoRA": dict.fromkeys(SIZES, (5.9, 11.8, 23.6)),
    "KD-LoRA": {"bert": (2.4, 4.7, 9.4), "roberta": (2.9, 5.9, 11.8), "deberta-v3": (2.9, 5.9, 11.8)},
}
_PRECISION_TITLES = {"fp32": "fp32", "bf16": "bf16 autocast", "fp16": "fp16 autocast"}


@dataclass
class Figures:
    """What is known of one family.

    Attributes:
        plain: parameters of teacher and student, fine-tuned in full.
        adapted: for LoRA and KD-LoRA, by rank.
        memory: peak bytes of training, by precision and method.
        timing: inference, by precision.
    """

    plain: tuple[ParameterCounts, ParameterCounts]
    adapted: dict[str, dict[int, ParameterCounts]]
    memory: dict[str, dict[str, int | None]] = field(default_factory=dict)
    timing: dict[str, Timing] = field(default_factory=dict)

    def count(self, method: str) -> ParameterCounts:
        """Give the parameters at the measured rank.

        Args:
            method: one of `METHODS`.
        """
        return self.plain[0] if method == "FFT" else self.adapted[method][MEASURED_RANK]

    def resting_bytes(self, method: str) -> int:
        """Compute what fp32 weights and Adam's two moments take: 4 bytes a parameter, 8 more a trained one.

        Args:
            method: one of `METHODS`.
        """
        counts = self.count(method)
        return 4 * (counts.total + counts.adapter) + 8 * counts.trainable

    def seconds(self, precision: str, name: str) -> float | None:
        """Give the mean inference time.

        Args:
            precision: of the pass.
            name: one of `TIMED`.
        """
        timing = self.timing.get(precision)
        return None if timing is None else statistics.mean(timing.seconds[name])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; the first two columns are text, the others figures.

    Args:
        header: titles.
        rows: cells.
    """
    rule = ["---" if column < 2 else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *rows))


def _title(family: str, name: str) -> str:
    """Name the model that a method trains or runs."""
    return SIZES[family][1 if name.startswith("KD-LoRA") else 0].title


def _slashed(values: Iterable[float], digits: int) -> str:
    return " / ".join(f"{value:.{digits}f}" for value in values)


def parameters_section(results: dict[str, Figures]) -> str:
    """Write trainable and total parameters beside the paper's.

    Args:
        results: family to figures.
    """
    rows = []
    for family, figures in results.items():
        for column, method in enumerate(METHODS):
            published = COSTS[family].trainable[column] / 1e6
            if method == "FFT":
                ours, head, paper = f"{figures.plain[0].trainable / 1e6:.2f}", "all", f"{published:.0f}"
            else:
                ours = _slashed((figures.adapted[method][rank].adapter / 1e6 for rank in RANKS), 3)
                head = f"{figures.count(method).head / 1e6:.3f}"
                paper = _slashed((published, *_PAPER_HIGHER_RANKS[method][family]), 1)
            rows.append((_title(family, method), method, ours, head, paper))
    header = ("model", "method", f"rank {_slashed(RANKS, 0)}", "head, trained too", "paper")
    sizes = [
        (
            f"{SIZES[family][0].title} → {SIZES[family][1].title}",
            " → ".join(f"{counts.total / 1e6:.2f}" for counts in figures.plain),
            _per_cent(figures.plain[0].total, figures.plain[1].total),
            " → ".join(f"{total / 1e6:.0f}" for total in COSTS[family].total),
            f"{_stated('total'):.0f}%",
        )
        for family, figures in results.items()
    ]
    titles = ("pair", "parameters in all", "fewer", "as published with the models", "claimed")
    return (
        f"## Parameters, in millions\n\nTrainable:\n\n{table(header, rows)}\n\n"
        f"In all, adapters merged, head with two labels included:\n\n{table(titles, sizes)}\n"
    )


def _stated(key: str) -> float:
    return next(claim.stated for claim in claims() if claim.key == key)


def _per_cent(before: float | None, after: float | None) -> str:
    """Say how much smaller a figure is; a larger one shows as a negative saving."""
    return "–" if before is None or after is None or not before else f"{100 * (1 - after / before):.1f}%"


def memory_section(results: dict[str, Figures]) -> str:
    """Write peak memory of training beside the paper's.

    Args:
        results: family to figures.
    """
    precisions = _precisions(results)
    rows = []
    for family, figures in results.items():
        for column, method in enumerate(METHODS):
            peaks = [_megabytes(figures.memory.get(precision, {}).get(method)) for precision in precisions]
            resting = _megabytes(figures.resting_bytes(method))
            rows.append((_title(family, method), method, *peaks, resting, f"{COSTS[family].memory_mb[column]:.1f}"))
    measured = [f"peak, {_PRECISION_TITLES[precision]}" for precision in precisions]
    header = ("model", "method", *measured, "weights and Adam, computed", "paper")
    return f"## Memory of training at rank {MEASURED_RANK}, in MB (10⁶ bytes)\n\n{table(header, rows)}\n"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:.0f}"


def _precisions(results: dict[str, Figures]) -> list[str]:
    return list(dict.fromkeys(name for figures in results.values() for name in (*figures.memory, *figures.timing)))


def time_section(results: dict[str, Figures]) -> str:
    """Write inference time beside the paper's.

    Args:
        results: family to figures.
    """
    precisions = _precisions(results)
    rows = []
    for family, figures in results.items():
        published = dict(zip(METHODS, COSTS[family].seconds, strict=True))
        for name in TIMED:
            cells = [_spread(figures.timing.get(precision), name) for precision in precisions]
            fft, own = (figures.seconds("fp32", method) for method in ("FFT", name))
            paper = published.get(name.removesuffix(", merged")) if name != "LoRA, merged" else None
            share = (
                ("–", "–")
                if paper is None
                else (f"{paper:.2f}", _per_cent(published["FFT"], paper) if name != "FFT" else "")
            )
            rows.append((_title(family, name), name, *cells, _per_cent(fft, own) if name != "FFT" else "", *share))
    titles = [_PRECISION_TITLES[precision] for precision in precisions]
    header = ("model", "method", *titles, "less than FFT, fp32", "paper", "less than FFT, paper")
    return (
        "## Inference over CoLA's validation set (1,043 sentences), in seconds, mean ± sd over runs\n\n"
        f"{table(header, rows)}\n"
    )


def _spread(timing: Timing | None, name: str) -> str:
    if timing is None:
        return "–"
    values = timing.seconds[name]
    # A GPU needs well under a second, a CPU's thread a minute.
    digits = 3 if statistics.mean(values) < 5 else 1
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def claims_section(results: dict[str, Figures]) -> str:
    """Write the paper's claims on cost, what its own table gives, and what we find.

    Args:
        results: family to figures.
    """
    ours: dict[str, Callable[[Figures], str]] = {
        "total": lambda one: _per_cent(one.plain[0].total, one.plain[1].total),
        "trainable-fft": lambda one: _per_cent(one.plain[0].trainable, one.count("KD-LoRA").trainable),
        "trainable-lora": lambda one: _per_cent(one.count("LoRA").adapter, one.count("KD-LoRA").adapter),
        "memory-fft": lambda one: _per_cent(*(one.memory.get("fp32", {}).get(name) for name in ("FFT", "KD-LoRA"))),
        "memory-lora": lambda one: _per_cent(*(one.memory.get("fp32", {}).get(name) for name in ("LoRA", "KD-LoRA"))),
        "time": lambda one: _per_cent(*(one.seconds("fp32", name) for name in ("FFT", "KD-LoRA, merged"))),
    }
    rows = [
        (
            claim.text + (" (adapters alone)" if claim.key == "trainable-lora" else ""),
            f"{claim.stated:.0f}%",
            " / ".join(f"{claim.tables[family]:.0f}%" for family in results),
            " / ".join(ours[claim.key](figures) for figures in results.values()),
        )
        for claim in claims()
        if claim.key in ours
    ]
    names = " / ".join(FAMILY_TITLES[family] for family in results)
    header = ("claim about KD-LoRA", "claimed", "the paper's own table", "here, fp32")
    return f"## The paper's claims on cost ({names})\n\n{table(header, rows)}\n"


def notes_section(results: dict[str, Figures]) -> str:
    """Say what in the paper's table cannot be taken as it stands.

    Args:
        results: family to figures.
    """
    notes = [
        "**Trainable parameters.** LoRA adds rank × (inputs + outputs) to a projection: at rank 8, two projections "
        "of 768 × 768 in 12 layers make 8 × 1,536 × 24 = 294,912. The paper states "
        f"{_ratio(results, 'LoRA')} times as much for LoRA and {_ratio(results, 'KD-LoRA')} times for KD-LoRA, at "
        "every rank. DistilBERT and DistilRoBERTa have the same six layers, yet the paper gives them different counts.",
        "**The head.** It starts random and must be trained; the paper leaves it out of its count. With it, "
        + "; ".join(_with_head(family, figures) for family, figures in results.items())
        + ". So the halving that the paper claims against LoRA is one of the adapters alone.",
        "**Compactness.** About 40% fewer parameters holds for DistilBERT alone: a student keeps its teacher's "
        "embeddings whole, and those of the other pairs are larger.",
        "**Memory.** The paper says now training, now inference. Its figures fit neither: read as 10⁶ bytes, they lie "
        f"{_offset(results)} MB above what the fp32 weights and Adam's two moments take by themselves, with no room "
        "for the gradients of full fine-tuning nor for activations. That looks like what is held between two steps. "
        "A machine must hold the peak, and with frozen weights most of what comes on top is activations, which LoRA "
        "does not spare.",
        "**Time.** The paper claims one figure, 30%, for all pairs; its own table gives "
        + ", ".join(f"{_paper_saving(family):.0f}%" for family in results)
        + ". It also times LoRA with the adapters still beside the weights; merged, it has the shape of the FFT "
        "model. KD-LoRA is timed here as it is shipped, merged.",
    ]
    return "## What does not hold up in the paper's table\n\n" + "\n".join(f"- {note}" for note in notes) + "\n"


def _ratio(results: dict[str, Figures], method: str) -> str:
    """Compare the paper's trainable parameters with the adapters' own, lowest to highest family."""
    column = METHODS.index(method)
    ratios = [COSTS[family].trainable[column] / figures.count(method).adapter for family, figures in results.items()]
    return _range(ratios, 1)


def _offset(results: dict[str, Figures]) -> str:
    gaps = [
        COSTS[family].memory_mb[column] - figures.resting_bytes(method) / 1e6
        for family, figures in results.items()
        for column, method in enumerate(METHODS)
    ]
    return _range(gaps, 0)


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _with_head(family: str, figures: Figures) -> str:
    lora, student = (figures.count(method).trainable / 1e6 for method in ("LoRA", "KD-LoRA"))
    return f"{_title(family, 'LoRA')} trains {lora:.2f}M with LoRA, {_title(family, 'KD-LoRA')} {student:.2f}M"


def _paper_saving(family: str) -> float:
    return next(claim.tables[family] for claim in claims() if claim.key == "time")
