"""What a family or a recipe fills in where the user set nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

FamilyName = Literal["bert", "roberta", "deberta-v3"]
RecipeName = Literal["default", "paper", "paper-tuned"]

FAMILIES: dict[FamilyName, tuple[str, str]] = {
    "bert": ("bert-base-uncased", "distilbert-base-uncased"),
    "roberta": ("roberta-base", "distilroberta-base"),
    "deberta-v3": ("microsoft/deberta-v3-base", "microsoft/deberta-v3-small"),
}
"""Teacher and student of each family in the paper (KD-LoRA, section 3)."""

RECIPES: dict[RecipeName, dict[str, Any]] = {
    "default": {
        "data": {"augment": 4},
        "teacher": {"train": {"epochs": None, "learning_rate": None, "head_learning_rate": 1e-3}},
        "student": {
            "full_learning_rate": None,
            "train": {"epochs": None, "learning_rate": None, "dropout": 0.0},
        },
        "lora": {"targets": "all-linear", "rank": 16, "alpha": 32.0, "dropout": 0.0},
        "distil": {"alpha": 0.5, "temperature": 1.0},
    },
    "paper": {"distil": {"loss": "kl"}},
    "paper-tuned": {"student": {"train": {"epochs": 10, "learning_rate": 3e-3}}, "distil": {"loss": "kl"}},
}
"""Config sections by recipe; docs/recipes.md has what each was measured to gain.

`paper` (KD-LoRA, arXiv 2410.20777) is what the defaults of the keys themselves are, but for its loss.
"""


STEPS: dict[str, tuple[int, int, int]] = {"teacher": (6, 300, 4000), "student": (15, 600, 8000)}
"""Passes over the training rows, and the least and the most optimiser steps, where `epochs` is null."""


def epochs_for(role: str, rows: int, batch_size: int) -> float:
    """Choose the epochs of a training by its rows: some passes, but neither too few optimiser steps nor too many.

    Args:
        role: `teacher` or `student`.
        rows: of the training split.
        batch_size: rows of a step.
    """
    passes, least, most = STEPS[role]
    steps = -(-rows // batch_size)
    return float(max(1, round(min(max(passes, least / steps), most / steps))))


def full_rate(width: int) -> float:
    """Choose the peak learning rate of full fine-tuning by the model's hidden size.

    Args:
        width: hidden size.
    """
    return round(5e-5 * 768 / width, 7)


def adapter_rate(width: int) -> float:
    """Choose the peak learning rate of adapters by the model's hidden size.

    Args:
        width: hidden size.
    """
    return round(1e-3 * 384 / width, 6)


def fill_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the recipe under the user's values, and name the family's models."""
    recipe = values.get("recipe", "default")
    filled = lay_under(values, _fitting(RECIPES[recipe], values)) if recipe in RECIPES else dict(values)
    sections = {key: filled.get(key) or {} for key in ("teacher", "student")}
    if not all(isinstance(section, Mapping) for section in sections.values()):
        return filled
    teacher, student = sections.values()
    if filled.get("family") in FAMILIES:
        teacher_model, student_model = FAMILIES[filled["family"]]
        teacher = _with_default(teacher, "model", teacher_model)
        if student.get("from_teacher_layers") is None:
            student = _with_default(student, "model", student_model)
    return filled | {"teacher": teacher, "student": student}


def _fitting(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave copies of the texts out: no model labels them, the user has more texts than copies, or no data at all."""
    has_table = any(_is_set(values, "teacher", key) for key in ("logits", "probabilities"))
    if has_table or _is_set(values, "data", "unlabelled") or not values.get("data"):
        return {key: section for key, section in recipe.items() if key != "data"}
    return recipe


def _is_set(values: Mapping[str, Any], section: str, key: str) -> bool:
    given = values.get(section)
    return isinstance(given, Mapping) and given.get(key) is not None


def lay_under(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in nested defaults where a key is absent."""
    filled = dict(values)
    for key, default in defaults.items():
        given = filled.get(key)
        if isinstance(default, Mapping) and (given is None or isinstance(given, Mapping)):
            filled[key] = lay_under(given or {}, default)
        else:
            filled.setdefault(key, default)
    return filled


def _with_default(section: Mapping[str, Any], key: str, value: object) -> dict[str, Any]:
    return dict(section) if section.get(key) is not None else {**section, key: value}
