"""Near words: for the words of a text, those that a model's word vectors put beside them."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable

import torch
from transformers import PreTrainedTokenizerBase

from kdlora.configfile import expand_home
from kdlora.models.loading import load_word_vectors, open_source

logger = logging.getLogger(__name__)

NEAREST, LEAST = 10, 0.3
"""So many words are near to one at most, and their cosine is so high at least: that of two words at random is 0.0."""
_PARTS = re.compile(r"(\W*)(\w+)(\W*)")
_COSINES = 2**24  # at a time


def near_words(model: str, words: Iterable[str]) -> dict[str, list[str]]:
    """Give the nearest words of those that a model knows whole, with the marks and the capital of the word itself.

    Args:
        model: a folder, or a Hub id, with `@` and a revision behind it where it has one.
        words: as they stand in the texts.

    Raises:
        ModelError: it cannot be opened.
    """
    name, _, revision = (model, "", "") if expand_home(model).exists() else model.partition("@")
    found = load_word_vectors(open_source(name, revision or None, trust_remote_code=False))
    if found is None:
        logger.warning(
            "%s has no word vectors that can be read, so copies have no near words (data.augment_model)", name
        )
        return {}
    tokenizer, vectors = found
    number_of = _whole_words(tokenizer)
    parts = {word: match for word in words if (match := _PARTS.fullmatch(word))}
    asked = {word: number_of.get(match[2].lower(), number_of.get(match[2])) for word, match in parts.items()}
    rows = sorted({number for number in asked.values() if number is not None})
    near = dict(zip(rows, _nearest(vectors, rows, number_of), strict=True))
    return {
        word: [parts[word][1] + _like(parts[word][2], other) + parts[word][3] for other in near[number]]
        for word, number in asked.items()
        if number is not None and near[number]
    }


def _whole_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Number the pieces that are words: behind the mark of a beginning, or, in WordPiece, without that of a rest."""
    numbers = tokenizer.get_vocab()
    first = Counter(piece[:1] for piece in numbers)
    mark = next((mark for mark in ("Ġ", "▁") if first[mark] > len(numbers) / 10), "")  # of bytes; of SentencePiece
    words = {piece: number for piece, number in numbers.items() if piece.startswith(mark)}
    if mark:
        words = {tokenizer.convert_tokens_to_string([piece]).strip(): number for piece, number in words.items()}
    return {word: number for word, number in words.items() if word.isalpha()}


def _nearest(vectors: torch.Tensor, rows: list[int], number_of: dict[str, int]) -> list[list[str]]:
    words, numbers = list(number_of), list(number_of.values())
    of_words = torch.nn.functional.normalize(vectors[numbers], dim=1)
    found = []
    for asked in torch.tensor(rows, dtype=torch.long).split(max(1, _COSINES // max(1, len(words)))):
        ours = torch.nn.functional.normalize(vectors[asked], dim=1)
        best = (ours @ of_words.T).topk(min(2 * NEAREST + 2, len(words)), dim=1).indices
        # Once more, exactly: the same words on any number of threads.
        exact = torch.einsum("nw,nkw->nk", ours.double(), of_words[best].double())
        for own, places, cosines in zip(asked.tolist(), best.tolist(), exact.tolist(), strict=True):
            known = {words[place].casefold() for place in places if numbers[place] == own}
            near: list[str] = []
            for cosine, place in sorted(zip(cosines, places, strict=True), reverse=True):
                if cosine >= LEAST and len(near) < NEAREST and (key := words[place].casefold()) not in known:
                    known.add(key)
                    near.append(words[place])
            found.append(near)
    return found


def _like(word: str, other: str) -> str:
    """Write another word as a word is written: in capitals, with one, or without."""
    if len(word) > 1 and (word.isupper() or word.islower()):
        return other.upper() if word.isupper() else other.lower()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other
