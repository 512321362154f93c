"""The published figures of KD-LoRA (arXiv 2410.20777), to stand beside ours."""

from __future__ import annotations

from dataclasses import dataclass

ARMS = ("fft", "lora", "kd-lora")
"""The paper's three methods; the ranks of its Table 2 are `RANKS`."""
RANKS = (8, 16, 32, 64)
FAMILY_TITLES = {"bert": "BERT", "roberta": "RoBERTa", "deberta-v3": "DeBERTaV3"}

# Table 1, GLUE validation sets: the three methods for each family.
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
class PublishedCosts:
    """One family's part of Table 2, at rank 8, a figure for each of the three methods.

    `total` is of teacher and student, as published with the models; `memory_mb` is the GPU's; `seconds` is the
    inference time on CoLA's validation set; the trainable parameters of the two LoRA methods are given by rank, too.
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
    """One headline claim in words, and per cent: what the paper states, and what its tables give for each family."""

    key: str
    text: str
    stated: float
    tables: dict[str, float]


def published_scores(task: str) -> dict[str, dict[str, float]]:
    """Give Table 1's row of a GLUE task, by family and arm; empty where it has none."""
    if task == "mnli":
        one, other = (published_scores(f"mnli-{group}") for group in ("matched", "mismatched"))
        return {
            family: {arm: round((value + other[family][arm]) / 2, 2) for arm, value in scores.items()}
            for family, scores in one.items()
        }
    rows = zip(FAMILY_TITLES, _TABLE_1.get(task, ()), strict=task in _TABLE_1)
    return {family: dict(zip(ARMS, figures, strict=True)) for family, figures in rows}


def claims() -> tuple[Claim, ...]:
    """List the paper's headline claims beside what its tables give."""
    scores = published_scores("score")
    kept_fft = {family: 100 * one["kd-lora"] / one["fft"] for family, one in scores.items()}
    kept_lora = {family: 100 * one["kd-lora"] / one["lora"] for family, one in scores.items()}
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
    figures = {family: getattr(costs, field) for family, costs in COSTS.items()}
    return {family: 100 * (1 - values[after] / values[before]) for family, values in figures.items()}


def family_of(teacher: str | None, student: str | None) -> str | None:
    """Find the paper's family that a pair of models is."""
    names = [str(source or "").rstrip("/").rsplit("/", 1)[-1] for source in (teacher, student)]
    return next((family for family, costs in COSTS.items() if names == [costs.teacher, costs.student]), None)
