"""Tags of words: the schemes of files, spans as tags and back, and the words of a text. Light: numpy alone.

Inside, tags are numbers in strict IOB2: 0 is `O`, and type t has 2t + 1 for its first word (`B-`) and 2t + 2 for the
others (`I-`). A word without a tag has -100. `offsets` say where each row's words begin, and where the last ends.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kdlora.errors import DataError

Integers = npt.NDArray[np.int64]
Scheme = Literal["IO", "IOB1", "IOB2", "BILOU"]

OUTSIDE = "O"
WORD_COLUMNS = ("words", "tokens")
"""What columns of lists of words are called."""
SPAN_KEYS = (("start", "start_offset"), ("end", "end_offset"), ("label", "type", "entity_group"))
NO_TAG = -100
"""What a word has that has no tag: it is neither learnt nor scored."""
_PREFIXES = {"B": "B", "I": "I", "M": "I", "L": "E", "E": "E", "U": "S", "S": "S", "W": "S"}
LANGUAGE = re.compile("[a-z]{2,3}:")
_TAG = re.compile(r"([BIMLEUSW])-([^,;|]+)")  # what joins tags by a comma or a bar has several on a word
_RARE_TAGS = tuple(
    re.compile(form.replace("TYPE", "(?P<type>[^,;|]+)").replace("MARK", "(?P<prefix>[BIMLEUSW])"))
    for form in ("MARK[_:]TYPE", "TYPE[-_]MARK")
)
NO_SPACES = (
    "\u0e01-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Characters of scripts that put no spaces between words, as ranges of a regular expression: each of them is a word."""
_CLOSE = re.compile(f"[{NO_SPACES}\u3001-\u303f\uff01-\uff65]")
"""These, and their marks of punctuation: between two of them words that are joined have no space."""


class Span(NamedTuple):
    """A half-open stretch of one type, in words or in characters."""

    start: int
    end: int
    type: str


class Words(NamedTuple):
    """A text whose words are given: where each begins and ends, in characters, half open and ascending.

    Examples:
        >>> words = Words("Ada met Alan", [0, 4, 8], [3, 7, 12])
    """

    text: str
    starts: Sequence[int]
    ends: Sequence[int]


def tag_names(types: Sequence[str]) -> tuple[str, ...]:
    return (OUTSIDE, *(f"{prefix}-{name}" for name in types for prefix in "BI"))


def tag_types(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name.removeprefix("B-") for name in names[1::2])


def parse_tags(distinct: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Give prefix (B, I, E, S or O) and type of each tag of a file; those of no scheme are left out.

    Where no tag has a prefix, and `O` occurs, each is a type (IO), or all are spelt as `B_PER` or as `PER-B`.
    """
    matches = {tag: _TAG.fullmatch(tag) for tag in distinct if tag != OUTSIDE}
    if any(tag.startswith("b-") for tag in matches):
        lower = {tag: _TAG.fullmatch(tag[:1].upper() + tag[1:]) for tag in matches}
        matches = lower if all(lower.values()) else matches
    found = {tag: (_PREFIXES[match[1]], match[2]) for tag, match in matches.items() if match}
    for form in () if found else _RARE_TAGS:
        rare = {tag: (_PREFIXES[match["prefix"]], match["type"]) for tag in matches if (match := form.fullmatch(tag))}
        marked = set(rare.values())
        if len(rare) == len(matches) and any({("B", name), ("I", name)} <= marked for _, name in marked):
            found = rare
    if not found and OUTSIDE in distinct:
        found = {tag: ("I", tag) for tag in matches if tag and not re.search("[,;|]", tag)}
    return found | {OUTSIDE: (OUTSIDE, "")}


def normalise(
    codes: Integers, parsed: Sequence[tuple[str, str]], types: Sequence[str], offsets: Integers
) -> tuple[Integers, Scheme, Integers]:
    """Bring a file's tags into IOB2: give their numbers, the file's scheme, and the rows that broke it.

    A word's code is the place of its tag in `parsed`; a negative one has none. An entity begins at B and S, after E
    and S, and wherever the type changes, so that every sequence has a reading.
    """
    places = {name: place for place, name in enumerate(types)}
    own = np.array([*(places.get(name, -1) for _, name in parsed), -1])[np.maximum(codes, -1)]
    prefix = np.array([*(ord(prefix) for prefix, _ in parsed), ord(OUTSIDE)])[np.maximum(codes, -1)]
    begins, inside, ends, single = (prefix == ord(letter) for letter in "BIES")
    joined = _joined(own + 1, offsets)
    closed = np.concatenate(([False], (ends | single)[:-1]))
    first = begins | single | ~joined | closed
    if ends.any() or single.any():
        scheme: Scheme = "BILOU"
        goes_on = np.append((~first & (inside | ends))[1:], False)
        broken = ((inside | ends) & first) | ((begins | inside) & ~goes_on)
    else:
        scheme = "IO" if not begins.any() else "IOB1" if joined[begins].all() else "IOB2"
        broken = inside & ~joined if scheme == "IOB2" else np.zeros(len(codes), bool)
    tags = np.where(own < 0, 0, 2 * own + np.where(first, 1, 2))
    return np.where(codes < 0, NO_TAG, tags), scheme, rows_with(broken, offsets)


def rows_with(words: npt.NDArray[np.bool_], offsets: Integers) -> Integers:
    return np.unique(np.searchsorted(offsets, np.flatnonzero(words), side="right") - 1)


def decode(values: npt.NDArray[np.floating], offsets: Integers) -> Integers:
    """Decide tags from the logits (or probabilities) of words: the first largest, strays `I-` made to begin.

    A word that the model could not see, whose values are NaN, goes on with the entity around it, or is outside.
    """
    unseen = np.isnan(values).all(axis=1)
    count = np.cumsum(~unseen)
    own = np.argmax(values[~unseen], axis=1).astype(np.int64)
    own -= (own > 0) & (own % 2 == 0) & ~_joined((own + 1) // 2, np.append(0, count)[offsets])
    tags = np.append(own, 0)[count - ~unseen]  # of an unseen word that of the next one that is seen
    return np.where(unseen & (tags % 2 == 1), 0, tags)


def go_on(values: npt.NDArray[np.floating], names: Sequence[str], words: Integers) -> None:
    """Let words that share their sub-token with the word before go on with its entity: `I-` has what is above `B-`."""
    for place, name in enumerate(names):
        if len(words) and name.startswith("B-") and (inner := f"I-{name[2:]}") in names:
            pair = (words[:, None], np.array([place, names.index(inner)]))
            values[pair] = np.sort(values[pair], axis=1)


def entity_bounds(tags: Integers, offsets: Integers) -> tuple[Integers, Integers]:
    """Give the first words and the ends of all entities, strictly: `I-` without its `B-` before it is none."""
    tags = np.asarray(tags, np.int64)
    goes_on = (tags > 0) & (tags % 2 == 0) & _joined((tags + 1) // 2, offsets)
    edges = np.flatnonzero(~goes_on)
    is_entity = (tags[edges] > 0) & (tags[edges] % 2 == 1)
    return edges[is_entity], np.append(edges[1:], len(tags))[is_entity]


def spans_of(tags: Sequence[int] | Integers, names: Sequence[str]) -> list[Span]:
    numbers = np.asarray(tags, np.int64)
    starts, ends = entity_bounds(numbers, np.array([0, len(numbers)]))
    return [
        Span(start, end, names[numbers[start]].removeprefix("B-"))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]


def _joined(types: Integers, offsets: Integers) -> npt.NDArray[np.bool_]:
    """Say which words are of a type (above 0), and of that of the word before them in their row."""
    same = np.zeros(len(types), bool)
    same[1:] = types[1:] == types[:-1]
    same[offsets[offsets < len(types)]] = False
    return same & (types > 0)


@lru_cache(maxsize=1)
def _words() -> re.Pattern[str]:
    """Match letters, digits, marks and `_` in a row, or any other character that is no white space, with its marks.

    A sign that nobody sees, such as a soft hyphen, does not end a row of letters (as UAX 29 has it).
    """
    codes = {code for code in range(0x300, 0x20000) if unicodedata.category(chr(code))[0] == "M"}
    begins, ends = (sorted(code for code in codes if code + step not in codes) for step in (-1, 1))
    # As ranges: a set of single characters takes twenty times as long.
    marks = "".join(f"{chr(begin)}-{chr(end)}" for begin, end in zip(begins, ends, strict=True))
    marks += "\U000e0100-\U000e01ef"  # selectors of variants
    run = rf"(?:(?![{NO_SPACES}])[\w{marks}])+"
    return re.compile(rf"{run}(?:[\u00ad\u200c\u200d\u2060]+{run})*|\S[{marks}\u200d]*")


def split_words(text: str) -> tuple[list[int], list[int]]:
    bounds = [match.span() for match in _words().finditer(text)]
    return [start for start, _ in bounds], [end for _, end in bounds]


def join_words(given: Sequence[object], where: str, coded: bool = False) -> Words:
    """Make a text of words as training does, without words of white space, and where all are coded their `en:`."""
    words = [word.strip() for word in given if isinstance(word, str)]
    prefix = LANGUAGE.match(words[0]) if coded and words else None
    if prefix and all(word.startswith(prefix[0]) for word in words):
        words = [word[len(prefix[0]) :] for word in words]
    words = [word for word in words if word]
    if not all(word is None or isinstance(word, str) for word in given):
        raise DataError(f"{where}: expected a list of words, got {given!r:.60}.")
    if not words:
        raise DataError(f"{where}: no words. Remove the row.")
    return text_of(words)


def text_of(words: Sequence[str]) -> Words:
    """Put words together, with a space between two of them where their scripts write one."""
    gaps = ["" if _CLOSE.match(last[-1]) and _CLOSE.match(word) else " " for last, word in pairwise(words)]
    pieces = [*chain(*zip(words, [*gaps, ""], strict=True))]
    edges = [0, *accumulate(map(len, pieces))]
    return Words("".join(pieces), edges[:-1:2], edges[1::2])


def tags_from_spans(text: str, spans: Sequence[Span], where: str) -> tuple[list[int], list[int], list[str]]:
    """Give the words of a text, cut where a span begins or ends inside of one, and their tags in IOB2."""
    spans = [Span(_after_marks(text, span.start), _after_marks(text, span.end), span.type) for span in spans]
    edges = [edge for span in spans for edge in span[:2]]
    pieces: list[tuple[int, int]] = []
    for start, end in zip(*split_words(text), strict=True):
        inner = edges[bisect_right(edges, start) : bisect_left(edges, end)]
        pieces += pairwise(dict.fromkeys([start, *inner, end]))
    tags = [OUTSIDE] * len(pieces)
    for span in spans:
        first, after = (bisect_left(pieces, (edge, 0)) for edge in span[:2])
        if first == after:
            raise DataError(f"{where}: {_shown(span)} holds no word, only white space or a mark; correct its offsets")
        tags[first:after] = [f"{'I' if place else 'B'}-{span.type}" for place in range(after - first)]
    return [start for start, _ in pieces], [end for _, end in pieces], tags


def _after_marks(text: str, edge: int) -> int:
    """Move an edge behind the combining marks of the letter before it."""
    while 0 < edge < len(text) and _is_mark(text[edge]) and not text[edge - 1].isspace():
        edge += 1
    return edge


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M"


def cuts_word(text: str, span: Span) -> bool:
    """Whether a span begins or ends before a mark, or between two digits, or two letters that have small ones.

    The letters from Hebrew to Sinhala have none. Articles and prepositions stand before a word without a space there,
    so of these scripts ends alone count; scripts beyond write no spaces, or endings behind names.
    """
    pairs = [text[edge - 1 : edge + 1] for edge in span[:2] if 0 < edge < len(text)]
    last = text[span.end - 1 : span.end + 1]
    return any(
        pair.isdigit() or _is_mark(pair[1]) or all(one.lower() != one.upper() for one in pair) for pair in pairs
    ) or (len(last) == 2 and all("\u0590" <= one < "\u0e00" and (one.isalpha() or _is_mark(one)) for one in last))


def check_spans(given: Sequence[Mapping[str, object]], length: int, where: str) -> list[Span]:
    """Bring spans into order, each once, and refuse what no sequence of tags can say."""
    spans = []
    for one in given:
        start, end, label = (next((one[key] for key in keys if one.get(key) is not None), None) for keys in SPAN_KEYS)
        if not (type(start) is int and type(end) is int and isinstance(label, str) and label.strip()):
            raise DataError(
                f"{where}: {dict(one)} is no span; expected start and end, in characters, and a label, as in "
                '{"start": 0, "end": 5, "label": "PER"}'
            )
        spans.append(Span(start, end, label.strip()))
        if not 0 <= start < end <= length:
            fault = "ends before it has begun" if end <= start else f"leaves the text, which has {length} characters"
            raise DataError(f"{where}: {_shown(spans[-1])} {fault}; correct its offsets")
    spans = sorted(set(spans))
    for before, span in pairwise(spans):
        if span.start < before.end:
            raise DataError(
                f"{where}: {_shown(before)} and {_shown(span)} overlap; a word has one tag, so keep one of the two"
            )
    return spans


def _shown(span: Span) -> str:
    return f"the span {span.start} to {span.end} ({span.type})"
