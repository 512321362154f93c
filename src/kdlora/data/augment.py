"""More texts of a task, made from its training texts, for a teacher to label."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from datasets import Dataset

LOST = 0.15
"""Share of the words that are deleted or replaced, each with the same chance."""
SPLICED = 0.25
"""Share of the copies whose second half is another text's."""
ECHOED = 0.2
"""Share of the pairs whose second text is made from the first, so that a teacher sees close pairs too."""


def augment_texts(rows: Dataset, copies: int, *, seed: int = 0) -> Dataset:
    """Make perturbed copies of texts: words deleted, words replaced by words of the other texts, halves exchanged.

    The copies have no label, for a word may have carried it: they are for a teacher, whose answer to a broken text is
    a signal like any other. What a student lacks under distillation is texts, not labels.

    Args:
        rows: canonical columns `id`, `text` and for pairs `text_pair`.
        copies: of each row.
        seed: of the draws; they depend on nothing else.

    Returns:
        `copies` times the rows, with `id` ("<id>~1", …), `text` and `text_pair`.

    *Source*: word replacement for distillation, TinyBERT (Jiao et al., arXiv 1909.10351), section 3.3, with words drawn
    by frequency in place of a language model's; deletion, EDA (Wei and Zou, arXiv 1901.11196).
    """
    draw = np.random.default_rng(seed)
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    texts = {name: [_words(text) for text in rows[name]] for name in columns}
    bag = [word for column in texts.values() for words in column for word in words]  # a frequent word is in it often
    made: dict[str, list[str]] = {name: [] for name in ("id", *columns)}
    for copy in range(1, copies + 1):
        for row, identity in enumerate(rows["id"]):
            made["id"].append(f"{identity}~{copy}")
            for name in columns:
                echo = name == "text_pair" and draw.random() < ECHOED
                words = texts["text" if echo else name][row]
                other = texts[name][int(draw.integers(len(texts[name])))]
                made[name].append(_perturb(words, other, bag, draw))
    return Dataset.from_dict(made, features=rows.select_columns(list(made)).features)


def _words(text: str) -> list[str]:
    """Split at spaces; a text without any is split into its characters, each with its own place."""
    words = text.split()
    return words if len(words) > 1 else list(text.strip())


def _perturb(words: Sequence[str], other: Sequence[str], bag: Sequence[str], draw: np.random.Generator) -> str:
    """Perturb one text, and join it again; something of it always remains."""
    if draw.random() < SPLICED:
        words = [*words[: (len(words) + 1) // 2], *other[len(other) // 2 :]]
    chances = draw.random(len(words))
    kept = [
        word if chance >= LOST else bag[int(draw.integers(len(bag)))]
        for word, chance in zip(words, chances, strict=True)
        if chance >= LOST / 2  # below, the word is deleted
    ]
    glue = "" if words and all(len(word) == 1 for word in words) else " "
    return glue.join(kept or words)
