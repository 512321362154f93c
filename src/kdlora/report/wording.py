"""Figures and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import floor, inf

from kdlora.data.tasks import METRICS, Task
from kdlora.evidence.stats import Difference, MeanSd

MINUS = "−"

INTERVALS = (
    "Intervals are over rows and seeds. The part of the rows is a paired bootstrap, drawn jointly for both arms and "
    "all seeds. The part of the seeds is the variance of the seed-paired differences (t with Satterthwaite’s degrees "
    "of freedom). With one seed, intervals are over rows alone, and there is no verdict."
)
"""What an interval says, below every table that has one."""

ARMS = {
    "words": ("bag of words", "no transformer: a linear model on TF-IDF of words and characters, one seed"),
    "fft": ("FFT", "the teacher, all weights tuned"),
    "lora": ("LoRA", "a model of the teacher's size with adapters"),
    "kd-lora": ("KD-LoRA", "the student with adapters, taught by the teacher"),
    "student-fft": ("student FFT", "the same student, all weights tuned, without a teacher"),
    "student-lora": ("student LoRA", "the same student with adapters, without a teacher"),
    "kd-fft": ("KD-FFT", "the student, all weights tuned, taught by the teacher"),
}
"""An arm's title in a heading or legend, and what it is."""

_METRIC_TITLES = {
    **{name: name.replace("_", " ").replace("f1", "F1") for names in METRICS.values() for name in names},
    **{name: name.capitalize() for name in ("matthews", "pearson", "spearman")},
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "R²",
}


def arm_title(arm: str) -> str:
    return ARMS[arm][0] if arm in ARMS else arm


def metric_title(name: str) -> str:
    base, _, label = name.partition(":")
    if base == "cost":
        return "cost avoided, of the largest"
    if label:
        at = base.removeprefix("recall@")
        return f"{metric_title(base)} of {label}" if at == base else f"recall of {label} at precision {at}"
    known = [key for key in _METRIC_TITLES if name == key or name.startswith(f"{key}_")]
    base = max(known, key=len, default="")
    group = name.removeprefix(base).removeprefix("_")
    return _METRIC_TITLES.get(base, "") + (f", {group}" if base and group else group)


def of_label(name: str, task: Task) -> str:
    """Add its label to the name of a metric that is of the second of two labels alone."""
    is_of_second = name in ("f1", "average_precision") and task.kind == "single-label" and task.num_labels == 2
    return f"{name}:{task.label_names[1]}" if is_of_second else name


def score_title(task: Task) -> str:
    names = [metric_title(of_label(name, task)) for name in task.metrics]
    return names[0] if len(names) == 1 else f"mean of {' and '.join(names)}"


def model_title(source: str | None) -> str:
    """Shorten a model's source to its last part; a folder's path is nobody's business in a headline."""
    if not source:
        return "the teacher"
    name, separator, rest = source.partition(", layers ")
    return name.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] + separator + rest


def plus_minus(value: MeanSd | None, digits: int = 1, unit: str = "") -> str:
    if value is None:
        return "–"
    mean = points(value.mean, digits)
    return f"{mean}{unit}" if value.sd is None else f"{mean}\u00a0±\u00a0{value.sd:.{digits}f}{unit}"


def signed(value: float | None, digits: int = 1, *, plus: bool = True) -> str:
    """Write a number with a true minus sign; 0 carries no sign."""
    if value is None:
        return "–"
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS}{text}" if value < 0 else f"+{text}" if plus else text


def points(value: float | None, digits: int = 1) -> str:
    """Write a score, or points that are not gained but there."""
    return signed(value, digits, plus=False)


def interval(difference: Difference) -> str:
    return f"{signed(difference.low)} to {signed(difference.high)}"


def interval_cell(difference: Difference) -> str:
    why = "one seed" if difference.n_seeds < 2 else "few rows" if difference.sign is None else ""
    return f"{interval(difference)}{f' ({why}: no verdict)' if why else ''}"


def span(difference: Difference) -> str:
    level = f"{100 * difference.level:g}% interval"
    if difference.n_seeds < 2:
        return f"{level} over rows {interval(difference)}; one seed: no verdict"
    few = "; few rows: no verdict" if difference.sign is None else ""
    return f"{level} {interval(difference)}; n = {difference.n_seeds}{few}"


def shown(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def of_seeds(count: int) -> str:
    return f"Mean over {count} seeds." if count > 1 else "One seed."


def figure(value: float) -> str:
    """Write a metric as it is, with four decimals, and a small one with four digits."""
    return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.4g}"


def cores_of(machine: Mapping[str, str]) -> str:
    number = machine.get("cores", "")
    return number and f"{number} core{'s' * (number != '1')}"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _scaled(steps: Sequence[tuple[float, float, str, str]], value: float | None) -> str:
    """Write an amount in the unit of the first step whose limit is above it."""
    if value is None:
        return "–"
    unit, form, name = next(step[1:] for step in steps if value < step[0])
    return f"{value / unit:{form}}{name}"


_COUNTS = ((999.5, 1.0, ""), (999.5e3, 1e3, "\u00a0k"), (999.5e6, 1e6, "\u00a0M"), (inf, 1e9, "\u00a0B"))
count = partial(_scaled, tuple((below, unit, ".3g", name) for below, unit, name in _COUNTS))
size = partial(_scaled, ((1e8, 1e6, ".1f", "\u00a0MB"), (1e9, 1e6, ".0f", "\u00a0MB"), (inf, 1e9, ".2f", "\u00a0GB")))
"""Write bytes as MB or GB (powers of ten, as disks and the paper do)."""
milliseconds = partial(
    _scaled, tuple((below, 1, form, "\u00a0ms") for below, form in ((10, ".2f"), (100, ".1f"), (inf, ".0f")))
)
duration = partial(_scaled, ((90, 1, ".1f", "\u00a0s"), (5400, 60, ".1f", "\u00a0min"), (inf, 3600, ".1f", "\u00a0h")))


def change(saved: float, less: str) -> str:
    """Say how much is saved, in per cent; of countable things it is "fewer"."""
    if round(saved) == 0:
        return f"about as {'many' if less == 'fewer' else 'much'} as"
    return f"{share(abs(saved))} {less if saved > 0 else 'more'} than"


def times(larger: float, smaller: float) -> str:
    if not smaller > 0:
        return "–"
    ratio = larger / smaller
    return f"{ratio:.0f}×" if ratio >= 100 else f"{ratio:.1f}×" if ratio >= 0.1 else f"{ratio:.2g}×"


def share(value: float | None) -> str:
    """Write per cent without decimals, but never 100% for what only rounds to it."""
    if value is None:
        return "–"
    return f"{floor(10 * value) / 10:.1f}%" if 99.5 <= value < 100 else f"{points(value, 0)}%"


UNKNOWN = 0.02
"""Share of a model's tokens that may be unknown without a word, such as a rare emoji."""


def tell_unknown(shares: Mapping[str, float]) -> str:
    """Say what share of the texts' tokens some models, by role, cannot read; nothing where that is little."""
    told = [f"{share:.0%} by the {role}" for role, share in shares.items() if share >= UNKNOWN]
    return f"tokens that cannot be read: {', '.join(told)}; use models of the texts’ language" if told else ""
