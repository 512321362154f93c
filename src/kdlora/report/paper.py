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
    """One line of Table 2, at rank 8, and the model's size as published with it."""

    model: str
    total: float
    trainable: tuple[float, ...]  # by rank, for the two methods with adapters
    memory_mb: float  # of the GPU
    seconds: float  # inference on CoLA's validation set


_LORA, _KD_LORA = (2.9e6, 5.9e6, 11.8e6, 23.6e6), (1.5e6, 2.9e6, 5.9e6, 11.8e6)
COSTS = {
    "bert": {
        "fft": PublishedCosts("bert-base-uncased", 110e6, (110e6,), 1332.0, 6.10),
        "lora": PublishedCosts("bert-base-uncased", 110e6, _LORA, 463.5, 6.22),
        "kd-lora": PublishedCosts("distilbert-base-uncased", 66e6, (1.2e6, 2.4e6, 4.7e6, 9.4e6), 296.8, 5.36),
    },
    "roberta": {
        "fft": PublishedCosts("roberta-base", 125e6, (125e6,), 1515.9, 7.21),
        "lora": PublishedCosts("roberta-base", 125e6, _LORA, 531.9, 7.19),
        "kd-lora": PublishedCosts("distilroberta-base", 82e6, _KD_LORA, 358.3, 4.44),
    },
    "deberta-v3": {
        "fft": PublishedCosts("deberta-v3-base", 184e6, (183e6,), 2234.5, 14.37),
        "lora": PublishedCosts("deberta-v3-base", 184e6, _LORA, 763.4, 15.62),
        "kd-lora": PublishedCosts("deberta-v3-small", 141e6, _KD_LORA, 590.3, 10.38),
    },
}
"""Table 2, by family and method."""


@dataclass(frozen=True)
class Claim:
    """A headline claim: the per cent of another arm's score that is kept, or of one of its costs that is saved."""

    text: str
    stated: int  # by the paper, per cent
    of: str  # "score", or a field of PublishedCosts
    than: str  # the arm

    def in_tables(self, family: str) -> float:
        if self.of == "score":
            scores = published_scores("score")[family]
            return 100 * scores["kd-lora"] / scores[self.than]
        after, before = (getattr(COSTS[family][arm], self.of) for arm in ("kd-lora", self.than))
        if self.of == "trainable":
            after, before = after[0], before[0]
        return float(100 * (1 - after / before))


CLAIMS = (
    Claim("Score kept, of full fine-tuning", 97, "score", "fft"),
    Claim("Score kept, of LoRA", 98, "score", "lora"),
    Claim("Fewer parameters in all than the teacher", 40, "total", "fft"),
    Claim("Fewer trainable parameters than full fine-tuning", 99, "trainable", "fft"),
    Claim("Fewer trainable parameters than LoRA", 49, "trainable", "lora"),
    Claim("Less memory than full fine-tuning", 75, "memory_mb", "fft"),
    Claim("Less memory than LoRA", 30, "memory_mb", "lora"),
    Claim("Less inference time than full fine-tuning", 30, "seconds", "fft"),
)


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


def family_of(teacher: str | None, student: str | None) -> str | None:
    names = [str(source or "").rstrip("/").rsplit("/", 1)[-1] for source in (teacher, student)]
    pairs = {family: [costs["fft"].model, costs["kd-lora"].model] for family, costs in COSTS.items()}
    return next((family for family, pair in pairs.items() if pair == names), None)
