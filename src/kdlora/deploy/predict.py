"""One classifier interface for transformers and ONNX folders; an ONNX folder needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from kdlora.deploy.decisions import Decisions, read_decisions
from kdlora.deploy.folder import CONFIG_FILE, TOKENIZER, ModelFolder, Precision, read_model_folder
from kdlora.deploy.onnx_backend import OnnxBackend
from kdlora.errors import ArtifactError, DataError, ModelError, first_line
from kdlora.evidence.defer import measure_sureness
from kdlora.evidence.metrics import probabilities
from kdlora.evidence.thresholds import shift_logits
from kdlora.extras import check_installed
from kdlora.foreign import panics_as_errors

if TYPE_CHECKING:
    from tokenizers import Encoding

Text = str | tuple[str, str]
INPUTS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
"""Names of the arrays that a text becomes, and where an encoding has them."""

BATCH_SIZE = 32
BATCH_TOKENS = 1024
"""Most padded tokens that one forward pass holds: enough to keep the cores busy, and memory small."""


class Backend(Protocol):
    """What runs the network."""

    input_names: tuple[str, ...]  # of the arrays that `run` takes
    tokenizer_json: str  # content of the `tokenizer.json` that goes with it

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens); what fails is told by the caller."""


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
    """

    label: str | tuple[str, ...] | float | None
    probabilities: dict[str, float]
    deferred: str = ""


class Classifier:
    """A loaded model. `predict` may be called from several threads at once.

    Example:
        >>> Classifier.load("runs/sst2/onnx").predict(["a charming journey"])[0].label  # doctest: +SKIP
        'positive'
    """

    def __init__(self, folder: ModelFolder, backend: Backend, decisions: Decisions | None = None) -> None:
        """Join a described folder and its running network; most callers want `load`."""
        self.decisions = Decisions() if decisions is None else decisions
        self.folder, self.input_names, self._backend = folder, tuple(backend.input_names), backend
        if unknown := sorted(set(self.input_names) - INPUTS.keys()):
            raise ModelError(f"{folder.path}: the model takes {unknown[0]!r:.80}, which a text does not give.")
        if "input_ids" not in self.input_names:
            raise ModelError(f"{folder.path}: the model does not take input_ids, so it reads no text.")
        # Never changed from here on, so threads may share it.
        self._tokenizer = _open_tokenizer(folder, backend.tokenizer_json)
        self._pad = _pad_token_id(folder, self._tokenizer)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: Precision = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        verify: bool = True,
        defer: bool = True,
        thresholds: bool = True,
        revision: str | None = None,
    ) -> Classifier:
        """Load a model folder, or a model of the Hub.

        Args:
            folder: a transformers folder, an exported folder or an `.onnx` file in it; or a Hub id `USER/REPO`, a
                folder in it as `USER/REPO/onnx`, each with `@REVISION` behind it if need be.
            precision: which ONNX file of a folder that has several; `auto` prefers int8.
            threads: of the network's products; by default `OMP_NUM_THREADS`, else one a core. With PyTorch this is
                process-wide.
            max_length: cut texts to that many tokens; by default what the folder says.
            verify: compare every file of an export that decides an answer with the hash that the export recorded.
            defer: give no label below the threshold of the error rate that the folder promises, if it promises one.
            thresholds: say labels by the fitted thresholds of the folder, if it has some. False takes 0.5, or the most
                probable label, and defers nothing, since a promise is of the answers by thresholds.
            revision: commit, tag or branch of a Hub id.

        Returns:
            The classifier, ready to predict.

        Raises:
            ModelError: not a model folder, an adapter, no classification head; decisions of other weights.
            ArtifactError: a file is damaged or is not the one that was exported.
            MissingExtraError: a PyTorch folder, and the extra `train` is not installed.
        """
        if not Path(folder).exists():
            from kdlora.deploy.hub import locate_model  # here: what lies on this machine is served without it

            folder = locate_model(folder, revision=revision)
        described = read_model_folder(folder, precision=precision, max_length=max_length)
        if threads is not None and threads < 1:
            raise ModelError(f"threads must be at least 1, got {threads}.")
        decisions = read_decisions(described) if thresholds else Decisions()
        decisions = decisions if defer else replace(decisions, promise=None)
        if described.backend == "onnx":
            return cls(described, OnnxBackend(described, threads=threads, verify=verify), decisions)
        check_installed(f"{described.path} is a PyTorch model, which", "train")
        from kdlora.deploy.torch_backend import TorchBackend  # here: an ONNX folder is served without torch

        return cls(described, TorchBackend(described, threads=threads), decisions)

    from_pretrained = load

    def __repr__(self) -> str:
        """Say what is loaded, and from where."""
        folder = self.folder
        name = folder.path if folder.file is None else folder.path / folder.file.name
        return (
            f"Classifier({str(name)!r}, {folder.kind}, labels {list(self.label_names)}, {folder.backend}, "
            f"{folder.precision}, {folder.size_bytes / 1e6:.1f} MB, at most {folder.max_length} tokens)"
        )

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the logit columns."""
        return self.folder.label_names

    def predict(self, texts: Sequence[Text], *, batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """Classify texts; they are batched by length and come back in the order given.

        Args:
            texts: texts, or pairs of texts as tuples. Texts beyond `max_length` tokens are truncated.
            batch_size: most texts in one forward pass.

        Returns:
            One prediction a text.

        Raises:
            DataError: a text is empty or is no text; nothing is predicted then.
            ModelError: the model gives values that are not finite.
        """
        return self.to_predictions(self.predict_logits(texts, batch_size=batch_size))

    def predict_logits(
        self, texts: Sequence[Text], *, batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
    ) -> np.ndarray:
        """Compute the raw outputs; the temperature is not applied.

        Args:
            texts: as in `predict`.
            batch_size: most texts in one forward pass.
            batch_tokens: most padded tokens in one forward pass.

        Returns:
            float32 (texts, labels), in the order given.

        Raises:
            DataError: a text is empty or is no text.
            ModelError: the model gives values that are not finite.
        """
        if not len(texts):
            return np.empty((0, len(self.label_names)), dtype=np.float32)
        if isinstance(texts, str):
            texts = [texts]
        if batch_size < 1:
            raise ModelError(f"batch_size must be at least 1, got {batch_size}.")
        checked = [check_text(text, f"text {row}") for row, text in enumerate(texts)]
        logits = np.empty((len(checked), len(self.label_names)), dtype=np.float32)
        for rows, inputs in self.batches(checked, batch_size, batch_tokens):
            logits[rows] = self.run(inputs)
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ModelError(f"{self.folder.path}: the model's output for text {row} is not a finite number.")
        return logits

    def batches(
        self, texts: Sequence[Text], batch_size: int = BATCH_SIZE, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[tuple[list[int], dict[str, np.ndarray]]]:
        """Give the arrays that the model takes, texts of like length together, and which texts these are."""
        most = most_characters(self.folder.max_length)
        cut = [text[:most] if isinstance(text, str) else (text[0][:most], text[1][:most]) for text in texts]
        try:
            with panics_as_errors():
                encodings: list[Encoding] = self._tokenizer.encode_batch(cut)
        except Exception as error:
            place = self.folder.path / TOKENIZER
            raise ArtifactError(f"{place}: the tokenizer fails on a text: {first_line(error)}") from None
        for rows in length_batches([len(encoding) for encoding in encodings], batch_size, batch_tokens):
            shape = len(rows), len(encodings[rows[-1]])  # the longest is the last
            arrays = {name: np.zeros(shape, dtype=np.int64) for name in self.input_names}
            arrays["input_ids"][:] = self._pad
            for place_in_batch, row in enumerate(rows):
                for name, array in arrays.items():
                    array[place_in_batch, : len(encodings[row])] = getattr(encodings[row], INPUTS[name])
            yield rows, arrays

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 token arrays (rows, tokens), checked for their width."""
        place = self.folder.file or self.folder.path
        try:
            logits = self._backend.run(inputs)
        except Exception as error:  # a config or a graph decides what is computed, and it may be anybody's
            if self.folder.file is None and "memory" in str(error):
                raise MemoryError(first_line(error)) from error
            raise ModelError(f"{place}: the model cannot run ({first_line(error):.200}).") from error
        if not isinstance(logits, np.ndarray) or not np.issubdtype(logits.dtype, np.floating):
            kind = logits.dtype if isinstance(logits, np.ndarray) else type(logits).__name__
            raise ModelError(f"{place}: the first output must be floating-point logits, got {kind}.")
        rows = len(next(iter(inputs.values())))
        if logits.shape != (rows, len(self.label_names)):
            raise ModelError(
                f"{self.folder.path}: config.json names {len(self.label_names)} labels, but the model gives an "
                f"output of shape {logits.shape} for {rows} texts."
            )
        return logits

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
        names = self.label_names
        shifted = shift_logits(logits, names, self.decisions.thresholds, self.folder.temperature)
        if self.folder.kind == "multi-label":
            return [
                tuple(name for name, said in zip(names, row, strict=True) if said) for row in (shifted > 0).tolist()
            ]
        return [names[column] for column in shifted.argmax(axis=1).tolist()]

    def _defer(self, logits: np.ndarray) -> list[str]:
        """Say of each text why it is not answered, nothing where it is."""
        promise = self.decisions.promise
        if promise is None or not len(logits):
            return [""] * len(logits)
        sureness = measure_sureness(logits, promise.sureness, self.folder.temperature).tolist()
        return [
            "" if sure >= promise.threshold else f"{promise.sureness} {sure:.4g} is below {promise.threshold:.4g}"
            for sure in sureness
        ]


def most_characters(max_length: int) -> int:
    """Say how much of a text is worth reading: ten megabytes must not be tokenised to find that they are truncated."""
    return max(20_000, 100 * max_length)


def check_text(text: Any, where: str) -> Text:
    """Refuse what cannot be classified, rather than give it the label of an empty string."""
    if isinstance(text, tuple | list):
        if len(text) != 2:
            raise DataError(f"{where}: expected a text or a pair of texts, got {len(text)} values.")
        first, second = (_check_one(part, f"{where}, text {number}") for number, part in enumerate(text, 1))
        return first, second
    return _check_one(text, where)


def _check_one(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise DataError(f"{where}: expected a text, got {type(text).__name__} ({text!r:.40}).")
    if not text or text.isspace():
        raise DataError(f"{where}: the text is empty. Remove the row or give it a text.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: the text is not valid UTF-8 (at character {error.start}).") from None
    return text


def length_batches(lengths: Sequence[int], batch_size: int, batch_tokens: int) -> list[list[int]]:
    """Group rows of like length, so that little padding is computed."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for row in order:
        current = batches[-1] if batches else None
        if current is None or len(current) >= batch_size or (len(current) + 1) * lengths[row] > batch_tokens:
            batches.append([row])
        else:
            current.append(row)
    return batches


def spread(texts: Sequence[Text], count: int) -> list[Text]:
    """Take some texts, evenly spaced."""
    return [texts[row] for row in np.linspace(0, len(texts) - 1, min(count, len(texts)), dtype=int)]


def _open_tokenizer(folder: ModelFolder, content: str) -> Any:
    """Read a tokenizer, and fix where it truncates."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises a bare one for a damaged file
        raise ArtifactError(f"{folder.path / TOKENIZER}: the tokenizer cannot be read: {error}") from None
    tokenizer.no_padding()
    tokenizer.enable_truncation(folder.max_length, strategy="longest_first")
    return tokenizer


def _pad_token_id(folder: ModelFolder, tokenizer: Any) -> int:
    """Find the padding id; its value hardly matters, as padding is masked, but it must be in the vocabulary."""
    found = tokenizer.token_to_id(folder.pad_token) if folder.pad_token is not None else None
    if found is None:
        found = max(0, folder.pad_token_id or 0)
    if tokenizer.id_to_token(found) is None:
        raise ModelError(f"{folder.path / CONFIG_FILE}: pad_token_id {found} is no token of {TOKENIZER}.")
    return int(found)
