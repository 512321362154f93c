"""Entities in texts of any length, from transformers and ONNX folders; an ONNX folder needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np

from kdlora.data.tags import Words, decode, entity_bounds, go_on, split_words, tag_names
from kdlora.data.windows import hide_symbols, read_windows
from kdlora.deploy.decisions import Decisions, Which
from kdlora.deploy.folder import CONFIG_FILE, OPENVINO_INT8, ModelFolder, Way, read_model_folder
from kdlora.deploy.network import BATCH_SIZE, Backend, Network, Window, find_model
from kdlora.deploy.predict import Classifier, Prediction, check_one, iterate_texts
from kdlora.errors import DataError, ModelError
from kdlora.evidence.metrics import probabilities
from kdlora.system.environment import default_threads

Loaded = TypeVar("Loaded", bound=Network)


@dataclass(frozen=True, slots=True)
class Entity:
    """A span of a text, which is `text[start:end]`.

    Attributes:
        text: the characters of the span.
        start: its first character.
        end: the character behind its last one.
        label: its type.
        score: probability of that type, mean over the words, 0..1.

    Examples:
        >>> entity = Entity("Ada", 0, 3, "PER", 0.99)
    """

    text: str
    start: int
    end: int
    label: str
    score: float


class Tagger(Network):
    """A loaded model that marks entities. `predict` may be called from several threads at once.

    Examples:
        >>> tagger = Tagger.load("runs/names/student")
        >>> entities = tagger.predict("Ada met Alan")
    """

    marks_entities = True

    def __init__(self, folder: ModelFolder, backend: Backend, decisions: Decisions | None = None) -> None:
        """Join a described folder and its running network; most callers want `load`."""
        super().__init__(folder, backend, decisions)
        self.types = tuple(dict.fromkeys(name[2:] for name in self.label_names if name[:2] == "B-"))
        names = tag_names(self.types)
        if sorted(names) != sorted(self.label_names):
            raise ModelError(
                f"{folder.path / CONFIG_FILE}: expected the labels O, and B-TYPE and I-TYPE for each type of entity, "
                f"got {', '.join(self.label_names):.200}."
            )
        self._columns = [self.label_names.index(name) for name in names]

    @overload
    def predict(self, texts: str, *, batch_size: int = BATCH_SIZE) -> list[Entity]: ...  # type: ignore[overload-overlap]

    @overload
    def predict(self, texts: Sequence[str | Words], *, batch_size: int = BATCH_SIZE) -> list[list[Entity]]: ...

    def predict(
        self, texts: str | Sequence[str | Words], *, batch_size: int = BATCH_SIZE
    ) -> list[Entity] | list[list[Entity]]:
        """Mark the entities of one text, or of several; long texts are read in overlapping windows.

        Args:
            texts: a text, or texts; an empty one has no entities.
            batch_size: most windows in one forward pass.

        Returns:
            The entities in the order of the text; for several texts a list for each.

        Raises:
            DataError: what is no text, or longer than a million characters; nothing is predicted then.
            ModelError: the model gives values that are not finite.
        """
        if isinstance(texts, str):
            return self.predict([texts], batch_size=batch_size)[0]
        given = self._check(texts)
        values, offsets = self.predict_logits(given, batch_size=batch_size)[:, self._columns], word_offsets(given)
        tags, table = decode(values, offsets), probabilities(values, "single-label", self.folder.temperature)
        found: list[list[Entity]] = [[] for _ in given]
        for first, after in zip(*map(np.ndarray.tolist, entity_bounds(tags, offsets)), strict=True):
            row, column = int(np.searchsorted(offsets, first, side="right")) - 1, int(tags[first])
            text, starts, ends = given[row]
            start, end = int(starts[first - offsets[row]]), int(ends[after - 1 - offsets[row]])
            score = float(np.nanmean(table[first:after, column : column + 2].sum(axis=1)))  # of words that are seen
            found[row].append(Entity(text[start:end], start, end, self.types[column // 2], score))
        return found

    def predict_logits(self, texts: Sequence[str | Words], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Compute float32 logits (words of all texts, labels) as `Classifier.predict_logits`; NaN: no token is left.

        The words of a plain text are its runs of letters and digits, and single other characters. In a script without
        spaces, such as Chinese, each character is a word.
        """
        given = self._check(texts)
        windows, offsets = self._windows(given), word_offsets(given)
        logits = np.full((int(offsets[-1]), len(self.label_names)), np.nan, dtype=np.float32)
        for rows, found in self.run_all(windows, batch_size):
            for row, values in zip(rows, found, strict=True):
                logits[windows[row].words] = values[windows[row].places]
        read = np.concatenate([window.words for window in windows] or [np.empty(0, np.int64)])
        joined = [one.words[1:][(np.diff(one.places) == 0) & (np.diff(one.words) == 1)] for one in windows]
        go_on(logits, self.label_names, np.concatenate(joined or [read]))
        if not np.isfinite(logits[read]).all():
            word = read[~np.isfinite(logits[read]).all(axis=1)][0]
            row = int(np.searchsorted(offsets, word, side="right")) - 1
            raise ModelError(f"{self.folder.path}: the model's output for text {row} is not a finite number.")
        return logits

    def _check(self, texts: Any) -> list[Words]:
        return [check_words(text, f"text {row}") for row, text in enumerate(iterate_texts(texts))]

    def _windows(self, texts: Sequence[Words]) -> list[Window]:
        """Cut texts into the windows in which a word is read."""
        found: list[Window] = []
        encodings, offsets = self.encode([text for text, _, _ in texts]), word_offsets(texts)
        for number, (encoding, (text, starts, ends)) in enumerate(zip(encodings, texts, strict=True)):
            read = read_windows(encoding.offsets, encoding.special_tokens_mask, starts, ends, self.folder.max_length)
            hide_symbols(text, starts, read, encoding.ids, self._tokenizer)
            ids, types = np.asarray(encoding.ids), np.asarray(encoding.type_ids)
            seen = np.flatnonzero(read.place >= 0)
            edges = np.searchsorted(read.window[seen], np.arange(len(read.tokens) + 1)).tolist()
            for tokens, first, after in zip(read.tokens, edges, edges[1:], strict=False):
                if first < after:
                    words = seen[first:after]
                    found.append(Window(ids[tokens], types[tokens], number, words + offsets[number], read.place[words]))
        return found


Model = Classifier | Tagger
Answer = Prediction | list[Entity]
"""What a model says of one text."""


def load_model(
    folder: str | Path | Way, *, threads: int | None = None, max_length: int | None = None, decisions: Which = "all"
) -> Model:
    """Load a classifier or a tagger, as the folder says."""
    described = find_model(Way.of(folder), max_length=max_length)
    return model_type(described).open(described, threads=threads, decisions=decisions)


def load_for_many(folder: str | Path, load: Callable[..., Loaded]) -> Loaded:
    """Load a model, of an experiment its export, for many texts."""
    from kdlora.deploy.hub import locate_export, locate_model  # here: a model that is loaded already is served without

    path = locate_export(folder)
    if (path / OPENVINO_INT8).is_file() and not any(path.glob("*.onnx")):  # an experiment's, for OpenVINO alone
        path = locate_model(folder)
    many = default_threads() if read_model_folder(path).backend == "onnx" else 1
    model = load(path, threads=1 if many > 1 else None)  # in one batch for all threads, they wait for each other
    model.at_once = many
    return model


def model_type(folder: ModelFolder) -> type[Classifier] | type[Tagger]:
    return Tagger if folder.kind == "tokens" else Classifier


def word_offsets(texts: Sequence[Words]) -> np.ndarray:
    """Say where the words of each text begin among those of all, and where the last one ends."""
    return np.cumsum([0, *(len(words.starts) for words in texts)], dtype=np.int64)


def check_words(text: Any, where: str) -> Words:
    """Refuse what cannot be read, and find the words of a text that comes without them; an empty text has none."""
    if not isinstance(text, Words):
        found = check_one(text, where, whole=True)
        return Words(found, *split_words(found))
    found, *words = check_one(text.text, where, whole=True), text.starts, text.ends
    if len(words[0]) != len(words[1]) or (np.diff([0, *np.stack(words, axis=1).ravel(), len(found)]) < 0).any():
        raise DataError(f"{where}: expected words that follow each other within the text.")
    return text
