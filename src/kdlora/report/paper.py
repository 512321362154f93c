"""The published figures of KD-LoRA (arXiv 2410.20777), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

FAMILY_TITLES = {"bert": "BERT", "roberta": "RoBERTa", "deberta-v3": "DeBERTaV3"}

# Table 1, GLUE validation sets: FFT, LoRA, KD-LoRA for each family.
_TABLE_1 = {
    "cola": ((57.7, 56.9, 56.3), (60.9, 59.4, 56.8), (67.8, 69.1, 68.1)),
    "mnli-matched": ((84.5, 83.4, 82.0), (87.7, 87.2, 83.3), (90.3, 90.3, 88.8)),
    "mnli-mismatched": ((84.9, 83.9, 82.4), (87.4, 86.9, 83.4), (90.6, 90.2, 89.0)),
    "mrpc": ((89.0, 89.2, 88.3), (91.1, 89.9, 89.3), (91.9, 90.9, 90.7)),
    "qnli": ((91.8, 91.1, 89.7), (92.7, 92.8, 90.7), (94.1, 94.3, 93.4)),
    "qqp": ((89.7, 87.9, 89.1), (89.8, 88.6, 87.3), (91.2, 90.4, 89.9)),
    "rte": ((71.6, 70.1, 64.0), (74.8, 71.8, 65.3), (85.0, 84.0, 78.8)),
    "sst2": ((92.8, 92.6, 92.0), (94.3, 94.2, 92.9), (95.9, 96.0, 95.7)),
    "stsb": ((89.5, 88.9, 88.7), (90.8, 90.3, 87.9), (91.5, 91.1, 89.8)),
    "wnli": ((56.3, 56.9, 56.3), (56.3, 56.3, 56.3), (66.9, 56.3, 56.3)),
    "score": ((80.8, 80.1, 78.9), (82.6, 81.7, 79.3), (86.5, 85.3, 84.1)),
}


@dataclass(frozen=True)
class PublishedScores:
    """One cell group of Table 1, in points."""

    fft: float
    lora: float
    kd_lora: float


@dataclass(frozen=True)
class PublishedCosts:
    """One family's part of Table 2, at rank 8.

    Attributes:
        teacher: the teacher's name.
        student: the student's name.
        trainable: trainable parameters of FFT, LoRA and KD-LoRA.
        total: parameters of teacher and student in all, as published with the models.
        memory_mb: GPU memory of FFT, LoRA and KD-LoRA.
        seconds: inference time on CoLA's validation set of FFT, LoRA and KD-LoRA.
        lora_by_rank: trainable parameters of LoRA at rank 8, 16, 32 and 64.
        kd_lora_by_rank: the same of KD-LoRA.
    """

    teacher: str
    student: str
    trainable: tuple[float, float, float]
    total: tuple[float, float]
    memory_mb: tuple[float, float, float]
    seconds: tuple[float, float, float]
    lora_by_rank: tuple[float, ...] = (2.9e6, 5.9e6, 11.8e6, 23.6e6)
    kd_lora_by_rank: tuple[float, ...] = (1.5e6, 2.9e6, 5.9e6, 11.8e6)


COSTS = {
    "bert": PublishedCosts(
        "bert-base-uncased",
        "distilbert-base-uncased",
        (110e6, 2.9e6, 1.2e6),
        (110e6, 66e6),
        (1332.0, 463.5, 296.8),
        (6.10, 6.22, 5.36),
        kd_lora_by_rank=(1.2e6, 2.4e6, 4.7e6, 9.4e6),
    ),
    "roberta": PublishedCosts(
        "roberta-base",
        "distilroberta-base",
        (125e6, 2.9e6, 1.5e6),
        (125e6, 82e6),
        (1515.9, 531.9, 358.3),
        (7.21, 7.19, 4.44),
    ),
    "deberta-v3": PublishedCosts(
        "deberta-v3-base",
        "deberta-v3-small",
        (183e6, 2.9e6, 1.5e6),
        (184e6, 141e6),
        (2234.5, 763.4, 590.3),
        (14.37, 15.62, 10.38),
    ),
}


@dataclass(frozen=True)
class Claim:
    """One headline claim: what is compared, what the paper says, what its own tables give.

    Attributes:
        key: our name for the quantity.
        text: the claim in words.
        stated: per cent, as in the abstract and text.
        tables: per cent for each family, computed from Tables 1 and 2.
    """

    key: str
    text: str
    stated: float
    tables: dict[str, float]


def published_scores(task: str) -> dict[str, PublishedScores]:
    """Give Table 1's row of a GLUE task for each family."""
    if task == "mnli":
        parts = [published_scores(f"mnli-{group}") for group in ("matched", "mismatched")]
        return {
            family: PublishedScores(*(_mean(getattr(part[family], name) for part in parts) for name in _SCORE_NAMES))
            for family in parts[0]
        }
    if task not in _TABLE_1:
        return {}
    return {family: PublishedScores(*figures) for family, figures in zip(FAMILY_TITLES, _TABLE_1[task], strict=True)}


_SCORE_NAMES = ("fft", "lora", "kd_lora")


def _mean(values: object) -> float:
    """Average two figures of the paper, to its one decimal more."""
    listed = list(values)  # type: ignore[call-overload]
    return round(sum(listed) / len(listed), 2)


def claims() -> tuple[Claim, ...]:
    """List the paper's headline claims beside what its tables give."""
    scores = published_scores("score")
    kept_fft = {family: 100 * one.kd_lora / one.fft for family, one in scores.items()}
    kept_lora = {family: 100 * one.kd_lora / one.lora for family, one in scores.items()}
    return (
        Claim("kept-fft", "Score kept, of full fine-tuning", 97.0, kept_fft),
        Claim("kept-lora", "Score kept, of LoRA", 98.0, kept_lora),
        Claim("total", "Fewer parameters in all than the teacher", 40.0, _saved("total", 0, 1)),
        Claim("trainable-fft", "Fewer trainable parameters than full fine-tuning", 99.0, _saved("trainable", 0, 2)),
        Claim("trainable-lora", "Fewer trainable parameters than LoRA", 49.0, _saved("trainable", 1, 2)),
        Claim("memory-fft", "Less memory than full fine-tuning", 75.0, _saved("memory_mb", 0, 2)),
        Claim("memory-lora", "Less memory than LoRA", 30.0, _saved("memory_mb", 1, 2)),
        Claim("time", "Less inference time than full fine-tuning", 30.0, _saved("seconds", 0, 2)),
    )


def _saved(field: str, before: int, after: int) -> dict[str, float]:
    """Compute how much smaller one figure of Table 2 is than another, per cent."""
    figures = {family: getattr(costs, field) for family, costs in COSTS.items()}
    return {family: 100 * (1 - values[after] / values[before]) for family, values in figures.items()}


def family_of(teacher: str | None, student: str | None) -> str | None:
    """Find the paper's family that a pair of models is."""
    names = [str(source or "").rstrip("/").rsplit("/", 1)[-1] for source in (teacher, student)]
    return next((family for family, costs in COSTS.items() if names == [costs.teacher, costs.student]), None)


RANKS = (8, 16, 32, 64)
"""The ranks of Table 2."""
