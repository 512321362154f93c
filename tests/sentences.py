"""Small data of words and tags that a tiny model can learn: what is said of a film, and by whom."""

import json
import random
from pathlib import Path

from tiny import BAD, GOOD

NAMES = ("Paris", "Zürich")
SHAPES = ("what a {} film", "the {} story was {}", "a {} plot in {}", "{} music and a {} ending", "the acting")


def tagged_rows(count: int, seed: int = 0) -> list[dict[str, list[str]]]:
    """Make sentences in which praise, blame (of one word or two) and places are entities."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for part in draw.choice(SHAPES).split():
            kind = draw.choice(("GOOD", "BAD", "PLACE")) if part == "{}" else "O"
            chosen = {"GOOD": GOOD, "BAD": BAD, "PLACE": NAMES, "O": (part,)}[kind]
            length = draw.choice((1, 2)) if kind == "BAD" else 1
            words += [draw.choice(chosen) for _ in range(length)]
            tags += ["O"] if kind == "O" else [f"B-{kind}", f"I-{kind}"][:length]
        rows.append({"words": words, "tags": tags})
    return rows


def write_conll(path: Path, rows: list[dict[str, list[str]]]) -> Path:
    """Write a word and its tag a line."""
    path.write_text(
        "\n".join("".join(f"{word}\t{tag}\n" for word, tag in zip(*row.values(), strict=True)) for row in rows),
        encoding="utf-8",
    )
    return path


def write_words(path: Path, rows: list[dict[str, list[str]]]) -> Path:
    """Write words and tags as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


PIECES = (
    *("wonderful", "film", "Zürich", "naïve", "Straße", "a", "2", "the", "日本語", "Привет", "x" * 40),
    *("e\u0301", "n\u0303\u0323", "\u0301", "\u200d", "\ufeff", "\u00ad", "\x00", "\ufffd", "\U0001f600"),
    *("\U0001f469\u200d\U0001f4bb", "\U0001f1e8\U0001f1ed", "\u2764\ufe0f", "שלום", "\u202eעברית\u202c", "مرحبا", "ﷺ"),
    *("[SEP]", "[MASK]", "@a", "#b", "http://x.y/z?q=1", "...", "—", "'s", "½", "ß", "İ", "ǆ", "\u1e9b\u0323"),
)
SPACES = (" ", " ", " ", "", "", "\t", "\n", "\u00a0", "\u3000", "\u2028", "  \r\n")


def fuzzed_texts(count: int = 1000) -> list[str]:
    """Make texts that break offsets: what normalisation makes longer or shorter, joins, drops or turns around."""
    draw = random.Random(0)
    texts = ["", " ", "\u0301", "\ufeff", "y" * 10_000, "\U0001f600" * 300, "e\u0301" * 5_000, "日" * 200]
    while len(texts) < count:
        size = draw.choice((1, 3, 8, 20, 120))
        texts.append("".join(draw.choice(PIECES) + draw.choice(SPACES) for _ in range(size)))
    return texts
