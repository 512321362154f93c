"""One classifier interface for transformers and ONNX folders; an ONNX folder needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np

from kdlora.data.windows import WindowSettings
from kdlora.deploy.network import BATCH_SIZE, Network, Window
from kdlora.errors import DataError, ModelError, told_apart
from kdlora.evidence.defer import measure_sureness
from kdlora.evidence.metrics import probabilities

Text = str | tuple[str, str]
MOST_CHARACTERS = 1 << 20
"""Of a text that is read whole: all its tokens are in memory at once, some 200 bytes a character."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one text.

    Attributes:
        label: the most probable label (single-label), all labels of probability above 0.5 (multi-label), or the
            predicted value (regression); where the folder has fitted thresholds (`kdlora thresholds`), by these. None
            where the model does not answer: its folder promises an error rate (`kdlora defer`), and it is not sure
            enough of this text.
        probabilities: label name to probability in 0..1; empty for regression. Those of a multi-label task do
            not add up to 1.
        deferred: why there is no label; empty where there is one.

    Examples:
        >>> prediction = classifier.predict(["a film that stays with you for days"])[0]
        >>> sorted(prediction.probabilities)
        ['negative', 'positive']
    """

    label: str | tuple[str, ...] | float | None
    probabilities: dict[str, float]
    deferred: str = ""


class Classifier(Network):
    """A loaded model. `predict` may be called from several threads at once.

    Examples:
        >>> classifier = Classifier.from_pretrained("runs/reviews/student")
        >>> classifier.label_names
        ('negative', 'positive')
    """

    def predict(self, texts: Sequence[Text], *, batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """Classify texts; they are batched by length and come back in the order given.

        Args:
            texts: texts, or pairs of texts as tuples. Texts beyond `max_length` tokens are truncated, or
                read in windows, as in training (`data.long_texts`).
            batch_size: most texts in one forward pass.

        Returns:
            One prediction a text.

        Raises:
            DataError: a text is empty or is no text, or is a pair where the model was trained on single texts, or the
                other way round; nothing is predicted then.
            ModelError: the model gives values that are not finite.
        """
        return self.to_predictions(self.predict_logits(texts, batch_size=batch_size))

    def predict_logits(self, texts: Sequence[Text], *, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Compute the raw outputs; the temperature is not applied.

        Args:
            texts: as in `predict`.
            batch_size: most texts in one forward pass.

        Returns:
            float32 (texts, labels), in the order given.

        Raises:
            DataError: as in `predict`.
            ModelError: the model gives values that are not finite.
        """
        windows = self._windows(self._check(texts))
        logits = np.empty((len(windows), len(self.label_names)), dtype=np.float32)
        for rows, found in self.run_all(windows, batch_size):
            logits[rows] = found
        if self.folder.windows is not None:
            logits = self.folder.windows.pool_logits(logits, np.bincount([window.text for window in windows]))
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ModelError(f"{self.folder.path}: the model's output for text {row} is not a finite number.")
        return logits

    def _check(self, texts: Any) -> list[Text]:
        most = most_characters(self.folder.max_length, self.folder.windows)
        return [
            check_text(text, f"text {row}", self.folder.texts, most) for row, text in enumerate(iterate_texts(texts))
        ]

    def _windows(self, texts: Sequence[Text]) -> list[Window]:
        settings, longest, windows = self.folder.windows, self.folder.max_length, []
        for number, one in enumerate(self.encode(texts)):
            ids, types = np.asarray(one.ids, np.int32), np.asarray(one.type_ids, np.int32)
            own = [slice(None)] if settings is None else settings.cut(one.special_tokens_mask, longest)[0]
            windows += [Window(ids[tokens], types[tokens], number) for tokens in own]
        return windows

    def to_predictions(self, logits: np.ndarray) -> list[Prediction]:
        """Turn logits into labels and calibrated probabilities.

        Args:
            logits: float32 (texts, labels), as from `predict_logits`.
        """
        names, kind = self.label_names, self.folder.kind
        if kind == "regression":
            return [Prediction(float(row[0]) if len(row) == 1 else tuple(map(str, row)), {}) for row in logits]
        table = probabilities(logits, kind, self.folder.temperature).tolist()
        return [
            Prediction(None if why else label, dict(zip(names, values, strict=True)), why)
            for label, values, why in zip(self.decide(logits), table, self._defer(logits), strict=True)
        ]

    def decide(self, logits: np.ndarray) -> list[str | tuple[str, ...]]:
        """Name the label of each text, or its labels, whether or not the model is sure of them.

        Args:
            logits: float32 (texts, labels) of a classification, as from `predict_logits`.
        """
        names, shifted = self.label_names, self.shift(logits)
        if self.folder.kind == "multi-label":
            return [tuple(compress(names, row)) for row in (shifted > 0).tolist()]
        return [names[column] for column in shifted.argmax(axis=1).tolist()]

    def _defer(self, logits: np.ndarray) -> list[str]:
        """Say of each text why it is not answered, nothing where it is."""
        promise = self.decisions.promise
        if promise is None:
            return [""] * len(logits)
        least, sureness = promise.threshold, measure_sureness(logits, promise.sureness, self.folder.temperature)
        return [
            "" if sure >= least else f"{promise.sureness} {told_apart(sure, least)} is below {told_apart(least, sure)}"
            for sure in sureness.tolist()
        ]


def most_characters(max_length: int, windows: WindowSettings | None = None) -> int:
    """Say how much of a text is worth reading: ten megabytes must not be tokenised to find that they are truncated."""
    return max(20_000, 100 * max_length) if windows is None else MOST_CHARACTERS


def iterate_texts(texts: Any) -> Iterable[Any]:
    """Refuse what holds no texts, such as a table, of which one would read the names of its columns."""
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, bytes | Mapping) or hasattr(texts, "columns") or not isinstance(texts, Iterable):
        name = type(texts).__name__
        raise DataError(f"expected a list of texts, got {name}. Of a table, give the column that holds the texts.")
    return texts


def check_text(text: Any, where: str, texts: int | None = None, most: int | None = None) -> Text:
    """Refuse what cannot be classified, rather than give it the label of an empty string; `texts` are of an example.

    No more than the first `most` characters of a text are looked at and given.
    """
    if not isinstance(text, tuple | list):
        if texts == 2:
            raise DataError(f"{where}: expected a pair of texts, as the model was trained on, got one text.")
        return check_one(text, where, most=most)
    if len(text) != 2:
        raise DataError(f"{where}: expected a text or a pair of texts, got {len(text)} values.")
    if texts == 1:
        raise DataError(f"{where}: expected one text, as the model was trained on, got a pair of texts.")
    first, second = (check_one(part, f"{where}, text {number}", most=most) for number, part in enumerate(text, 1))
    return first, second


def check_one(text: Any, where: str, *, whole: bool = False, most: int | None = None) -> str:
    """Refuse what is no single text; one that is read whole may be empty, but has a largest length."""
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got {type(text).__name__} ({text!r:.40}).")
    text = text[:most] if most is None or not text[:most].isspace() else text.lstrip()[:most]
    if not whole and (not text or text.isspace()):
        raise DataError(f"{where}: the text is empty. Remove the row or give it a text.")
    if whole and len(text) > MOST_CHARACTERS:
        raise DataError(f"{where}: {len(text):,} characters, more than {MOST_CHARACTERS:,} in one text. Split it.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the text is not valid UTF-8 (at character {error.start}); save it as UTF-8."
        ) from None
    return text
