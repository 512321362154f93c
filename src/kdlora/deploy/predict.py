"""One classifier interface for transformers and ONNX folders; an ONNX folder needs neither torch nor transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from kdlora.deploy.encode import BATCH_SIZE, BATCH_TOKENS, Text, TextEncoder, check_text
from kdlora.deploy.folder import ModelFolder, Precision, read_model_folder
from kdlora.deploy.onnx_backend import OnnxBackend
from kdlora.errors import ModelError
from kdlora.evidence.metrics import probabilities


class Backend(Protocol):
    """What runs the network."""

    input_names: tuple[str, ...]  # of the arrays that `run` takes
    tokenizer_json: str  # content of the `tokenizer.json` that goes with it

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens)."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one text.

    Attributes:
        label: the most probable label (single-label), all labels of probability above 0.5 (multi-label), or the
            predicted value (regression).
        probabilities: label name to probability in 0..1; empty for regression. Those of a multi-label task do
            not add up to 1.
    """

    label: str | tuple[str, ...] | float
    probabilities: dict[str, float]


class Classifier:
    """A loaded model. `predict` may be called from several threads at once.

    Example:
        >>> Classifier.load("runs/sst2/onnx").predict(["a charming journey"])[0].label  # doctest: +SKIP
        'positive'
    """

    def __init__(self, folder: ModelFolder, backend: Backend) -> None:
        """Join a described folder and its running network; most callers want `load`."""
        self.folder = folder
        self.encoder = TextEncoder(folder, backend.input_names, backend.tokenizer_json)
        self._backend = backend

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: Precision = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        verify: bool = True,
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
            revision: commit, tag or branch of a Hub id.

        Returns:
            The classifier, ready to predict.

        Raises:
            ModelError: not a model folder, an adapter, no classification head.
            ArtifactError: a file is damaged or is not the one that was exported.
            KdLoraError: the runtime is not installed.
        """
        if not Path(folder).exists():
            from kdlora.deploy.hub import locate_model  # here: what lies on this machine is served without it

            folder = locate_model(folder, revision=revision)
        described = read_model_folder(folder, precision=precision, max_length=max_length)
        if threads is not None and threads < 1:
            raise ModelError(f"threads must be at least 1, got {threads}.")
        if described.backend == "onnx":
            return cls(described, OnnxBackend(described, threads=threads, verify=verify))
        from kdlora.deploy.torch_backend import TorchBackend  # here: an ONNX folder is served without torch

        return cls(described, TorchBackend(described, threads=threads))

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
        for rows, inputs in self.encoder.batches(checked, batch_size, batch_tokens):
            logits[rows] = self.run(inputs)
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ModelError(f"{self.folder.path}: the model's output for text {row} is not a finite number.")
        return logits

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 token arrays (rows, tokens), checked for their width."""
        logits = self._backend.run(inputs)
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
        table = probabilities(logits, kind, self.folder.temperature)
        predictions = []
        for row, values in zip(table, table.tolist(), strict=True):
            label: str | tuple[str, ...] = names[int(row.argmax())]
            if kind == "multi-label":
                label = tuple(name for name, value in zip(names, values, strict=True) if value > 0.5)
            predictions.append(Prediction(label, dict(zip(names, values, strict=True))))
        return predictions
