"""What each row is asked: labels with their codes, examples, a template; and what an answer says of the labels."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from kdlora.asking.asksettings import AskSettings
from kdlora.errors import ConfigError, first_line

CODES = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""No I: a refusal begins with it ("I cannot ...")."""
LEAST_MASS = 0.1
"""Probability that the codes together have, at least, in an answer that is one of them."""
LEAST_PROBABILITY = 1e-6
_FIELDS = {"text", "text_pair", "labels", "examples"}
_AROUND = " \t\r\n.:,;()[]{}*\"'`_▁Ġ"
_HAIR = 1e-3
LEAST_OF_GROUP = 0.05
"""Probability from which a group of many labels is asked within."""

Row = Mapping[str, Any]
"""A row in canonical columns: id, text, text_pair of a pair, label."""


@dataclass(frozen=True)
class Option:
    """What can be answered: a code, and the places of the labels that it stands for."""

    code: str
    name: str
    description: str
    labels: tuple[int, ...]


class Questions:
    """One template, filled for rows."""

    def __init__(
        self, template: Path | None, labels: Mapping[str, str], examples: Sequence[Row], settings: AskSettings
    ) -> None:
        self.name = str(template or "default prompt")
        self.names, self.votes, self._examples = list(labels), bool(settings.votes), examples
        self._answer_tokens = settings.answer_tokens
        file = template or Path(__file__).with_name("prompt.j2")
        try:
            self.source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"{file}: the prompt cannot be read ({first_line(fault)}); give a text file") from None
        environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            found = meta.find_undeclared_variables(environment.parse(self.source))
            self._template = environment.from_string(self.source)
        except TemplateSyntaxError as fault:
            raise ConfigError(f"{file}, line {fault.lineno}: not a Jinja template ({fault.message})") from None
        except RecursionError:
            raise ConfigError(f"{file}: the prompt is nested too deep; write it simpler") from None
        for name in sorted(found - _FIELDS):
            known = ", ".join(sorted(_FIELDS))
            raise ConfigError(f"{file}: the prompt has an unknown field {name!r}; there are {known}")
        if "text" not in found:
            raise ConfigError(f"{file}: the prompt never shows {{{{ text }}}}, so nobody could answer it")
        self.groups = [_named(labels, settings)] if settings.codes == "names" else _lettered(labels, settings)

    @cached_property
    def choices(self) -> list[Option]:
        if len(self.groups) == 1:
            return self.groups[0]
        return [
            Option(code, ", ".join(option.name for option in group), "", tuple(option.labels[0] for option in group))
            for code, group in zip(CODES, self.groups, strict=False)
        ]

    @property
    def tokens_of_answer(self) -> int:
        """Say how many tokens hold any answer; a token of a code has at least a byte."""
        return max(self._answer_tokens, *(len(option.code.encode()) for option in self.choices)) if self.votes else 1

    def fill(self, row: Row, options: Sequence[Option]) -> str:
        """Write the question about a row; a row is never an example of itself."""
        shown = [
            {**_texts(example), "label": self.names[example["label"]], "code": option.code}
            for example in self._examples
            for option in options
            if example["label"] in option.labels and _texts(example) != _texts(row)
        ]
        try:
            filled = self._template.render(**_texts(row), labels=options, examples=shown)
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as fault:
            raise ConfigError(
                f"{self.name}: the prompt cannot be filled: {first_line(fault)}; its fields are text, text_pair of a "
                "pair, labels and examples"
            ) from None
        return str(filled).strip()

    def check(self, row: Row) -> None:
        """Fill every question once, and see that it shows each code."""
        for options in (self.choices, *self.groups):
            marked = [replace(one, code=f"\x02{one.code}\x03") for one in options]
            filled = self.fill(row, marked)
            missing = [one.name for one in marked if one.code not in filled]
            if missing:
                raise ConfigError(
                    f"{self.name}: the prompt shows no code of the label {missing[0]!r}; write "
                    "{% for label in labels %}{{ label.code }}: {{ label.name }} ... for each"
                )


def _lettered(labels: Mapping[str, str], settings: AskSettings) -> list[list[Option]]:
    """Give the options of each question: of the only one, or of those within the groups of many labels."""
    count, most = len(labels), min(settings.top_logprobs, len(CODES))
    parts = 1 if settings.votes or count <= most else -(-count // most)
    if parts > most:
        raise ConfigError(
            f"{count} labels are too many for {most} likely tokens, even in two steps ({most * most}); raise "
            "top_logprobs if the server shows more, or ask with votes"
        )
    named = [(name, text, (place,)) for place, (name, text) in enumerate(labels.items())]
    codes = CODES if count <= len(CODES) * parts else [str(number + 1) for number in range(count)]
    return [
        [Option(code, *named[place]) for code, place in zip(codes, places, strict=False)]
        for places in np.array_split(np.arange(count), parts)
    ]


def _named(labels: Mapping[str, str], settings: AskSettings) -> list[Option]:
    """Give options whose codes are the labels' names, each to be told by its first token."""
    if len(labels) > (most := settings.top_logprobs):
        raise ConfigError(f"codes: names is for as many labels as the server shows ({most}), not {len(labels)}")
    begun: dict[str, str] = {}
    for name in labels:
        first = re.split(r"[\W_]+", name.strip(_AROUND).casefold(), maxsplit=1)[0]
        if (other := begun.setdefault(first, name)) != name:
            raise ConfigError(
                f"codes: names needs labels that begin with different words, but there are {other!r} and {name!r}; "
                "rename one by --labels, or use letters"
            )
    for one, other in itertools.permutations(filter(str.isdigit, begun), 2):
        if other.startswith(one) and not settings.votes:  # as one of the tokens 1 and 0
            told = f"{begun[other]!r} from {begun[one]!r}, which may be its first token"
            raise ConfigError(f"codes: names cannot tell {told}; rename one by --labels, or use letters")
    return [Option(name, name, text, (place,)) for place, (name, text) in enumerate(labels.items())]


def _texts(row: Row) -> dict[str, str]:
    return {name: row[name] for name in ("text", "text_pair") if name in row}


def read_logprobs(likely: Sequence[tuple[str, float]], options: Sequence[Option]) -> np.ndarray | None:
    """Turn the likely first tokens into probabilities of the options; None where the answer is none of them.

    A code that is not shown gets an equal part of the mass that is not shown, at most the least that is shown. A token
    may be the beginning of a name, and shares its mass evenly where it begins several.
    """
    mass = np.zeros(len(options))
    shown = np.array([math.exp(min(0.0, value)) for _, value in likely])
    for (token, _), probability in zip(likely, shown, strict=True):
        places = _meant(token.strip(_AROUND), options)
        mass[places] += probability / max(1, len(places))
    if mass.sum() < LEAST_MASS:
        return None
    missing = mass == 0
    if missing.any():
        rest = max(0.0, 1.0 - float(shown.sum())) / int(missing.sum())
        mass[missing] = min(rest, float(shown.min()))
    return _normalise(mass)


def _meant(said: str, options: Sequence[Option]) -> list[int]:
    """Find the options whose code a token is, or else those whose code is a name that it begins."""
    if any(option.code != option.name for option in options):
        return [place for place, option in enumerate(options) if option.code == said]
    names, said = [option.name.strip(_AROUND).casefold() for option in options], said.casefold()
    if said in names:
        return [names.index(said)]
    begun = [place for place, name in enumerate(names) if said and name.startswith(said)]
    if len(said) == 1 and said.isascii() and said.isalpha():  # it may be a word of a refusal: "I cannot", "a text"
        return [place for place in begun if names[place].split()[0] == said]
    return begun


def read_vote(answer: str, options: Sequence[Option]) -> int | None:
    """Find the option that an answer names: by its name alone, or by its code at the beginning."""
    as_written: Callable[[str], str] = str
    for fold in (as_written, str.casefold):  # of the labels b and e, `b` is the first, and `B` the code of the second
        codes, said = {fold(option.code) for option in options}, fold(answer.strip(_AROUND))
        for place, option in enumerate(options):
            is_name = option.name == option.code or fold(option.name) not in codes
            if is_name and fold(option.name.strip(_AROUND)) == said:
                return place
    for place, option in enumerate(options):
        code, name = re.escape(option.code), re.escape(option.name)
        # "A film" begins with an article, "A" alone, "A: ..." and "A positive" with a code
        after = r"\s*[^\w\s]|\s*\n|\s*$" + rf"|\s+(?i:{name})(?!\w)" + ("" if code in CODES else r"|\s")
        if option.code == option.name and len(option.name) > 1:
            code = f"(?i:{code})"
        unsigned = r"(?<![-+−])" if option.code[:1].isdigit() else ""  # of -1, the 1 is no answer
        if re.match(rf"[\s\W]*{unsigned}{code}(?:{after})", answer):
            return place
    return None


def count_votes(votes: Sequence[int | None], count: int) -> np.ndarray | None:
    """Turn votes into probabilities, half a vote spread evenly; None where most votes are for nothing.

    Of equally many the first was drawn by the model and not by the order of the labels: it is ahead by a hair.
    """
    valid = [vote for vote in votes if vote is not None]
    if not valid or 2 * len(valid) < len(votes):
        return None
    weights = 1 + _HAIR * 0.5 ** np.arange(len(valid))
    return _normalise(np.bincount(valid, weights, minlength=count) + 0.5 / count)


def join_groups(groups: np.ndarray, options: Sequence[Option], within: Mapping[int, np.ndarray]) -> np.ndarray:
    """Multiply the probability of each group by those within it; a group that was not asked shares evenly."""
    joined = np.zeros(sum(len(option.labels) for option in options))
    for place, option in enumerate(options):
        inner = within.get(place, np.full(len(option.labels), 1 / len(option.labels)))
        joined[list(option.labels)] = groups[place] * inner
    return _normalise(joined)


def likely_groups(groups: np.ndarray) -> list[int]:
    """Name the groups to be asked within: those that are likely enough, and the likeliest in any case."""
    return [int(place) for place in np.flatnonzero(groups >= min(LEAST_OF_GROUP, groups.max()))]


def _normalise(mass: np.ndarray) -> np.ndarray:
    kept = np.maximum(mass / mass.sum(), LEAST_PROBABILITY)
    return np.asarray(kept / kept.sum())
