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
        "data": {"augment": None},
        "teacher": {
            "train": {
                "epochs": None,
                "learning_rate": None,
                "head_learning_rate": 1e-3,
                "select": "auto",
                "class_weights": "auto",
            }
        },
        "student": {
            "full_learning_rate": None,
            "train": {
                "epochs": None,
                "learning_rate": None,
                "warmup_fraction": 0.2,
                "dropout": 0.0,
                "select": "auto",
                "class_weights": "auto",
            },
        },
        "lora": {"targets": "all-linear", "rank": 16, "alpha": 32.0, "dropout": 0.0},
        "distil": {"alpha": 0.5, "temperature": 1.0},
        "run": {"arms": ("words", "fft", "kd-lora", "kd-fft", "student-lora")},
    },
    "paper": {},
    "paper-tuned": {"student": {"train": {"epochs": 10, "learning_rate": 3e-3}}},
}
"""Config sections by recipe; docs/recipes.md has what each was measured to gain.

`paper` (KD-LoRA, arXiv 2410.20777) is what the defaults of the keys themselves are.
"""

STEPS: dict[str, tuple[int, int, int, int]] = {"teacher": (6, 300, 4000, 120), "student": (15, 600, 8000, 20)}
"""Where `epochs` is null: passes over the rows, the least and the most optimiser steps, the passes for many labels."""
STEPS_A_LABEL, STEPS_A_TYPE = 10, 100
"""The least steps for a label, or type of entities; a teacher of weighed labels takes 2 times, of several 4 times."""


def epochs_for(role: str, rows: int, steps_for_labels: int, batch_size: int) -> float:
    """Choose the epochs of a `teacher` or `student`: some passes, but neither too few optimiser steps nor too many."""
    passes, least, most, most_passes = STEPS[role]
    steps = -(-rows // batch_size)
    for_labels = min(steps_for_labels / steps, most_passes)
    return float(max(1, round(min(max(passes, for_labels, least / steps), most / steps))))


def copies_for(asked: int | None, rows: int) -> int:
    """Choose open copies of each text: fewer of many texts, and no more than the passes of a student draw."""
    if asked is not None:
        return asked
    return min(int(epochs_for("student", rows, 0, 32)), max(4, min(15, 24_000 // rows)))


def full_rate(width: int) -> float:
    """Choose the peak learning rate of full fine-tuning by the model's hidden size."""
    return round(5e-5 * 768 / width, 7)


def adapter_rate(width: int) -> float:
    """Choose the peak learning rate of adapters by the model's hidden size."""
    return round(1e-3 * 384 / width, 6)


def fill_in(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay the recipe under the user's values, and name the family's models."""
    recipe, family = values.get("recipe", "default"), values.get("family")
    filled, given = dict(values), values.get("teacher")
    asked: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    if asked.get("tuning") == "lora":
        fully = ["kd-fft"] if recipe == "default" else []  # the paper's recipes keep its arms
        filled = lay_under(filled, {"run": {"arms": ["words", "lora", "kd-lora", *fully, "student-lora"]}})
    if isinstance(recipe, str) and recipe in RECIPES:
        # No copies of the texts where no model labels them, or there are no data at all.
        copied = values.get("data") and all(asked.get(key) is None for key in ("logits", "probabilities"))
        filled = lay_under(filled, {key: part for key, part in RECIPES[recipe].items() if copied or key != "data"})
    teacher, student = (filled.get(key) or {} for key in ("teacher", "student"))
    if not isinstance(teacher, Mapping) or not isinstance(student, Mapping):
        return filled
    if isinstance(family, str) and family in FAMILIES:
        names = FAMILIES[family]
        if teacher.get("model") is None:
            teacher = {**teacher, "model": names[0]}
        if student.get("model") is None and student.get("from_teacher_layers") is None:
            student = {**student, "model": names[1]}
    return filled | {"teacher": teacher, "student": student}


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
