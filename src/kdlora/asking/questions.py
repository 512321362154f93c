"""Which rows are asked and what: labels with their codes, examples, a template; what an answer says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from datasets import Dataset
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, UndefinedError, meta
from jinja2.sandbox import SandboxedEnvironment

from kdlora.asking.asksettings import LEAST_AUDIT_ROWS, AskSettings
from kdlora.config import TaskConfig
from kdlora.configfile import expand_home
from kdlora.data.canonical import Reading
from kdlora.data.labels import KNOWN_COLUMNS, infer_columns, infer_task
from kdlora.data.read import Source, open_file
from kdlora.data.spool import read_column, slice_rows
from kdlora.data.tasks import Task
from kdlora.errors import ConfigError, DataError, did_you_mean, first_line
from kdlora.system.integrity import hash_file

CODES = "ABCDEFGHJKLMNOPQRSTUVWXYZ"
"""No I: a refusal begins with it ("I cannot ...")."""
LEAST_MASS = 0.1
"""Probability that the codes together have, at least, in an answer that is one of them."""
LEAST_PROBABILITY = 1e-6
_FIELDS = {"text", "text_pair", "labels", "examples"}
_AROUND = " \t\r\n.:,;()[]{}*\"'`_▁Ġ"
_TOKENS_OF_VOTE = 8
_HAIR = 1e-3
_SLICE = 1000
_LEAST_BEGUN = 2
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
        """Take the labels in the table's order."""
        self.path = template
        self.names, self.votes, self._examples = list(labels), bool(settings.votes), examples
        file = template or Path(__file__).with_name("prompt.j2")
        try:
            self.source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as fault:
            raise ConfigError(f"{file}: the prompt cannot be read ({first_line(fault)}); give a text file") from None
        self._environment = SandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        self._template = self._compile(file)
        most = settings.top_logprobs
        self.groups = [_named(labels, most)] if settings.codes == "names" else self._groups(labels, most)

    def _compile(self, file: Path) -> Any:
        try:
            found = meta.find_undeclared_variables(self._environment.parse(self.source))
            for name in sorted(found - _FIELDS):
                raise ConfigError(
                    f"{file}: the prompt has an unknown field {name!r}; there are {', '.join(sorted(_FIELDS))}."
                    f"{did_you_mean(name, _FIELDS)}"
                )
            for name in ("text", "labels"):
                if name not in found:
                    raise ConfigError(f"{file}: the prompt never shows {{{{ {name} }}}}, so nobody could answer it")
            return self._environment.from_string(self.source)
        except TemplateSyntaxError as fault:
            raise ConfigError(f"{file}, line {fault.lineno}: not a Jinja template ({fault.message})") from None

    def _groups(self, labels: Mapping[str, str], most: int) -> list[list[Option]]:
        """Give the options of each question: of the only one, or of those within the groups of many labels."""
        count, most = len(labels), min(most, len(CODES))
        parts = 1 if self.votes or count <= most else -(-count // most)
        if parts > most:
            raise ConfigError(
                f"{count} labels are too many for {most} likely tokens, even in two steps ({most * most}); raise "
                "top_logprobs if the server shows more, or ask with votes"
            )
        named = list(labels.items())
        groups = []
        for places in np.array_split(np.arange(count), parts):
            codes = CODES if len(places) <= len(CODES) else [str(number + 1) for number in range(count)]
            groups.append(
                [
                    Option(code, named[place][0], named[place][1], (int(place),))
                    for code, place in zip(codes, places, strict=False)
                ]
            )
        return groups

    @cached_property
    def choices(self) -> list[Option]:
        """What the first question lets choose from: labels, or groups of them."""
        if len(self.groups) == 1:
            return self.groups[0]
        return [
            Option(code, ", ".join(option.name for option in group), "", tuple(option.labels[0] for option in group))
            for code, group in zip(CODES, self.groups, strict=False)
        ]

    @property
    def tokens_of_answer(self) -> int:
        return _TOKENS_OF_VOTE if self.votes else 1

    def fill(self, row: Row, options: Sequence[Option]) -> str:
        """Write the question about a row; a row is never an example of itself."""
        shown = [
            {**_texts(example), "label": self.names[example["label"]], "code": option.code}
            for example in self._examples
            for option in options
            if example["label"] in option.labels and example["text"] != row["text"]
        ]
        try:
            filled = self._template.render(**_texts(row), labels=options, examples=shown)
        except UndefinedError as fault:
            raise ConfigError(f"{self._where}: the prompt has an unknown field: {fault.message}") from None
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as fault:
            raise ConfigError(f"{self._where}: the prompt cannot be filled: {first_line(fault)}") from None
        return str(filled).strip()

    def check(self, row: Row) -> None:
        """Fill every question once, and see that it shows each code."""
        for options in [self.choices] if len(self.groups) == 1 else [self.choices, *self.groups]:
            marked = [Option(f"\x02{one.code}\x03", one.name, one.description, one.labels) for one in options]
            filled = self.fill(row, marked)
            missing = [one.name for one in marked if one.code not in filled]
            if missing:
                raise ConfigError(
                    f"{self._where}: the prompt shows no code of the label {missing[0]!r}; write "
                    "{% for label in labels %}{{ label.code }}: {{ label.name }} ... for each"
                )

    @property
    def _where(self) -> str:
        return str(self.path or "the default prompt")


def _named(labels: Mapping[str, str], most: int) -> list[Option]:
    """Give options whose codes are the labels' names, each to be told by its first token."""
    if len(labels) > most:
        raise ConfigError(f"codes: names is for as many labels as the server shows ({most}), not {len(labels)}")
    begun: dict[str, str] = {}
    for name in labels:
        first = re.split(r"[\W_]+", name.strip(_AROUND).casefold(), maxsplit=1)[0]
        if (other := begun.setdefault(first, name)) != name:
            raise ConfigError(
                f"codes: names needs labels that begin with different words, but there are {other!r} and {name!r}; "
                "rename one by --labels, or use letters"
            )
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
    if options[0].code != options[0].name:
        return [place for place, option in enumerate(options) if option.code == said]
    names, said = [option.name.strip(_AROUND).casefold() for option in options], said.casefold()
    if said in names:
        return [names.index(said)]
    return [place for place, name in enumerate(names) if len(said) >= _LEAST_BEGUN and name.startswith(said)]


def read_vote(answer: str, options: Sequence[Option]) -> int | None:
    """Find the option that an answer names: by its name alone, or by its code at the beginning."""
    codes, said = {option.code for option in options}, answer.strip(_AROUND).casefold()
    for place, option in enumerate(options):
        if (option.name == option.code or option.name not in codes) and option.name.strip(_AROUND).casefold() == said:
            return place
    for place, option in enumerate(options):
        code, name = re.escape(option.code), re.escape(option.name)
        # "A film" begins with an article, "A" alone, "A: ..." and "A positive" with a code
        after = r"\s*[^\w\s]|\s*\n|\s*$" + rf"|\s+(?i:{name})(?!\w)" + ("" if code in CODES else r"|\s")
        if re.match(rf"[\s\W]*{code}(?:{after})", answer):
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


@dataclass(frozen=True)
class AskedRows:
    """What is asked about, in canonical columns."""

    task: Task
    labels: Mapping[str, str]  # with descriptions
    parts: Mapping[str, Dataset]  # by split of the table
    chosen: Mapping[str, np.ndarray]  # places of the rows that the table is to have
    audit: tuple[str, np.ndarray] | None  # split and places of the audited rows
    examples: list[dict[str, Any]]
    sources: dict[str, str]  # hashes of the files
    is_labelled: bool  # by people


def read_labels(file: str) -> dict[str, str]:
    """Read a YAML file of label names, a list or a mapping to descriptions."""
    try:
        content = yaml.load(expand_home(file).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as fault:
        raise ConfigError(f"{file}: no file of labels can be read there ({first_line(fault)})") from None
    if isinstance(content, list):
        words = {name for name in content if isinstance(name, str)}
        content = dict.fromkeys(content, "") if len(words) == len(content) else None
    if not isinstance(content, dict) or not all(isinstance(text, str) for text in content.values()):
        raise ConfigError(f"{file}: expected a list of different label names, or a mapping `name: what it means`")
    return {str(name): text for name, text in content.items()}


def read_asked_rows(data: str, settings: AskSettings) -> AskedRows:
    """Read everything that is asked about, and draw what is drawn."""
    source = _open(data, "the data")
    task, labelled = _task(source, settings)
    labels = dict(settings.labels or dict.fromkeys(task.label_names, ""))
    rows = _read(source, task, settings, labelled=labelled)
    parts, chosen = {"train": rows}, {"train": _choose(rows, settings)}
    if settings.unlabelled is not None:
        parts["unlabelled"] = _read(_open(settings.unlabelled, "unlabelled"), task, settings, labelled=False)
    audit, pool = None, np.arange(len(rows))
    if isinstance(settings.audit, str):
        parts["validation"] = _read(_open(settings.audit, "audit"), task, settings, labelled=True)
        audit = ("validation", np.arange(len(parts["validation"])))
        if len(audit[1]) < LEAST_AUDIT_ROWS:
            raise DataError(f"{settings.audit}: an audit takes at least {LEAST_AUDIT_ROWS} rows, found {len(audit[1])}")
    elif settings.audit is not None:
        audit = ("train", _drawn_audit(len(rows), settings.audit, settings, labelled=labelled))
        pool = np.setdiff1d(pool, audit[1])
    chosen |= {split: np.arange(len(part)) for split, part in parts.items() if split != "train"}
    examples = _examples(rows.select(pool) if labelled else None, settings, task)
    files = {"data": data, "unlabelled": settings.unlabelled, "audit": settings.audit}
    sources = {name: hash_file(expand_home(file)) for name, file in files.items() if isinstance(file, str)}
    return AskedRows(task, labels, parts, chosen, audit, examples, sources, labelled)


def each_row(rows: Dataset) -> Iterator[Row]:
    """Give rows one after the other, a slice in memory at a time."""
    for table in slice_rows(rows, rows.column_names, _SLICE):
        yield from table.to_pylist()


def _open(file: str, key: str) -> Source:
    return open_file(expand_home(file), key, plain=True)


def _task(source: Source, settings: AskSettings) -> tuple[Task, bool]:
    """Settle columns and labels, and whether people labelled the rows."""
    text = settings.text or (source.columns if source.plain else infer_columns(source, "text"))
    folded = {column.casefold() for column in source.columns}
    elsewhere = isinstance(settings.audit, str) and settings.label not in source.columns  # in the audited rows
    if elsewhere if settings.label else not folded & set(KNOWN_COLUMNS["label"]):
        label: tuple[str, ...] = ()
    else:
        label = (source.require(settings.label, "label"),) if settings.label else infer_columns(source, "label")
    names = tuple(settings.labels or ())
    if len({name.strip().casefold() for name in names} - {""}) != len(names):
        raise ConfigError("label names differ by more than case, and none is empty")
    if not label:
        if len(names) < 2:
            raise ConfigError(f"{source.name} has no label column; name the labels in a file: --labels FILE")
        return Task("single-label", tuple(text), (settings.label or "label",), names, ("accuracy",)), False
    config = TaskConfig(kind="single-label", text=tuple(text), label=label, label_names=names or None)
    return infer_task(source.read(label), tuple(text), label, config)[0], True


def _read(source: Source, task: Task, settings: AskSettings, *, labelled: bool) -> Dataset:
    own = settings.id_column if settings.id_column in source.columns or labelled else "id"
    return Reading(task, own).read({"": source}, labelled=labelled)


def _draw(count: int, settings: AskSettings, purpose: int) -> np.ndarray:
    return np.random.default_rng([settings.seed, purpose]).permutation(count)


def _drawn_audit(rows: int, wanted: int, settings: AskSettings, *, labelled: bool) -> np.ndarray:
    if not labelled:
        raise ConfigError("these rows have no labels to draw an audit from; give audit a file of rows that have")
    if wanted > rows:
        raise DataError(f"an audit of {wanted} rows cannot be drawn from {rows}")
    return _draw(rows, settings, 1)[:wanted]


def _examples(rows: Dataset | None, settings: AskSettings, task: Task) -> list[dict[str, Any]]:
    """Draw labelled rows, label by label in turn, so that every label has an example where there are enough."""
    if not settings.shots:
        return []
    if rows is None or len(rows) < settings.shots:
        raise ConfigError(f"{settings.shots} examples (shots) are drawn from rows with labels, and there are too few")
    order = _draw(len(rows), settings, 2)
    labels = read_column(rows, "label").to_numpy()[order]
    turn = np.zeros(len(rows), np.int64)
    for label in range(task.num_labels):
        of_label = labels == label
        turn[of_label] = np.arange(of_label.sum())
    chosen = order[np.argsort(turn, kind="stable")[: settings.shots]]
    return [rows[int(place)] for place in chosen]


def _choose(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Take the rows to be asked about; more of them later begin with these."""
    if settings.rows is None or settings.rows >= len(rows):
        return np.arange(len(rows))
    if settings.select == "random":
        order = _draw(len(rows), settings, 3)
    elif settings.select == "diverse":
        order = _spread(rows, settings)
    else:
        order = _doubts(rows, settings)
    return np.sort(order[: settings.rows])


def _spread(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Order rows so that one of each group of similar texts comes first: k-means of TF-IDF, nearest to its centre."""
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = read_column(rows, "text").to_pylist()
    words = TfidfVectorizer(sublinear_tf=True, max_features=20_000).fit_transform(texts)
    groups = MiniBatchKMeans(min(settings.rows or 1, 500), random_state=settings.seed, n_init=1, batch_size=2048).fit(
        words
    )
    near, turn = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
    for number, centre in enumerate(groups.cluster_centers_):
        members = np.flatnonzero(groups.labels_ == number)
        near[members] = words[members] @ centre
        turn[members[np.argsort(-near[members], kind="stable")]] = np.arange(len(members))
    return np.lexsort((-near, turn))


def _doubts(rows: Dataset, settings: AskSettings) -> np.ndarray:
    """Order rows by how little the first student prefers its label to the next."""
    from kdlora.deploy.predict import Classifier

    model = Classifier.load(str(settings.select_by))
    margins: list[float] = []
    for table in slice_rows(rows, ["text", *(["text_pair"] if "text_pair" in rows.column_names else [])], _SLICE):
        columns = [column.to_pylist() for column in table.columns]
        texts = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
        for found in model.predict(texts):
            best = sorted(found.probabilities.values(), reverse=True)
            margins.append(best[0] - best[1])
    return np.argsort(margins, kind="stable")
