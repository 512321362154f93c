"""Perturbed copies of training texts."""

from __future__ import annotations

from datasets import Dataset

from kdlora.data.augment import augment_texts

TEXTS = [f"the {word} film lasted {number} minutes and nobody left" for number, word in enumerate("abcdefgh" * 5)]


def rows(**columns: list[str]) -> Dataset:
    return Dataset.from_dict({"id": [str(row) for row in range(len(TEXTS))], **columns})


def test_copies_are_new_texts_of_old_words():
    """Copies that equal their texts teach nothing new; words from elsewhere would be another task's."""
    made = augment_texts(rows(text=TEXTS), 3, seed=1)
    assert made.column_names == ["id", "text"]
    assert len(made) == len(set(made["id"])) == 3 * len(TEXTS)
    assert made["id"][0] == "0~1"
    same = sum(text == TEXTS[row % len(TEXTS)] for row, text in enumerate(made["text"]))
    assert same < len(made) / 2
    assert {word for text in made["text"] for word in text.split()} <= {word for text in TEXTS for word in text.split()}
    assert all(made["text"])


def test_copies_depend_on_the_seed_alone():
    """Copies that change from process to process would make stored teacher logits stale."""
    one, same, other = (augment_texts(rows(text=TEXTS), 2, seed=seed) for seed in (1, 1, 2))
    assert one["text"][:] == same["text"][:]
    assert one["text"][:] != other["text"][:]


def test_how_much_is_lost():
    """A share that is read as its complement leaves noise; by hand: 7.5% deleted, 7.5% replaced, before splicing."""
    texts = [" ".join(f"w{row}-{place}" for place in range(20)) for row in range(200)]
    made = augment_texts(Dataset.from_dict({"id": [str(row) for row in range(200)], "text": texts}), 1)
    kept = [
        sum(word in text.split() for word in new.split()) / 20 for text, new in zip(texts, made["text"], strict=True)
    ]
    whole = [share for share in kept if share > 0.6]  # not spliced
    assert 0.65 < len(whole) / len(kept) < 0.85
    assert 0.82 < sum(whole) / len(whole) < 0.88


def test_pairs_and_texts_without_spaces():
    """A pair needs both its texts, some of them close to each other; Japanese has no spaces to split at."""
    pairs = augment_texts(rows(text=TEXTS, text_pair=["other words"] * len(TEXTS)), 2)
    assert pairs.column_names == ["id", "text", "text_pair"]
    echoes = sum("film" in text or "minutes" in text for text in pairs["text_pair"])
    assert 0 < echoes < len(pairs) / 2
    japanese = augment_texts(rows(text=["日本語のテキスト"] * len(TEXTS)), 1)
    assert all(text and " " not in text for text in japanese["text"])
    assert len(set(japanese["text"])) > 3
    single = augment_texts(Dataset.from_dict({"id": ["a"], "text": ["x"]}), 5)
    assert all(single["text"])
