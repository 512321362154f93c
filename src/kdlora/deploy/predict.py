"""One classifier interface for transformers and ONNX folders; an ONNX folder needs neither torch nor transformers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kdlora.deploy.encode import Text, TextEncoder, check_text, length_batches
from kdlora.deploy.folder import (
    CONFIG_FILE,
    EXPORT_RECORD,
    TOKENIZER,
    ModelFolder,
    Precision,
    read_model_folder,
)
from kdlora.deploy.onnx_file import read_onnx
from kdlora.errors import ArtifactError, KdLoraError, ModelError, first_line
from kdlora.evidence.calibration import probabilities
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.system.integrity import is_sealed_or_old

BATCH_SIZE = 32
BATCH_TOKENS = 1024
"""Most padded tokens that one forward pass holds: enough to keep the cores busy, and memory small."""


class Backend(Protocol):
    """What runs the network."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arrays that `run` takes."""

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

    def __init__(self, folder: ModelFolder, backend: Backend, tokenizer: str | None = None) -> None:
        """Join a described folder and its running network; most callers want `load`.

        Args:
            folder: labels, kind, limits and temperature.
            backend: computes logits in the order of `folder.label_names`.
            tokenizer: content of a `tokenizer.json`; by default that of the folder.
        """
        self.folder = folder
        self.encoder = TextEncoder(folder, backend.input_names, tokenizer)
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
            expected = _recorded_hashes(described) if verify else {}
            tokenizer = (described.path / TOKENIZER).read_bytes()
            check_hash(described.path / TOKENIZER, tokenizer, expected)
            backend = OnnxBackend(described, threads=threads, expected=expected)
            return cls(described, backend, tokenizer.decode("utf-8", errors="replace"))
        # Imported here: an ONNX folder must be served without torch and transformers.
        from kdlora.deploy.torch_backend import TorchBackend

        loaded = TorchBackend.load(described, threads=threads)
        return cls(described, loaded, loaded.tokenizer_json)

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
        encodings = self.encoder.encode(checked)
        for rows in length_batches([len(encoding) for encoding in encodings], batch_size, batch_tokens):
            logits[rows] = self.run(self.encoder.pad([encodings[row] for row in rows]))
        if not np.isfinite(logits).all():
            row = int(np.flatnonzero(~np.isfinite(logits).all(axis=1))[0])
            raise ModelError(f"{self.folder.path}: the model's output for text {row} is not a finite number.")
        return logits

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute logits of token arrays, checked for their width.

        Args:
            inputs: input name to int64 (rows, tokens).

        Returns:
            float32 (rows, labels).

        Raises:
            ModelError: the network gives another number of columns than config.json names.
        """
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


class OnnxBackend:
    """ONNX Runtime on the CPU."""

    def __init__(
        self, folder: ModelFolder, *, threads: int | None = None, expected: Mapping[str, str] | None = None
    ) -> None:
        """Open a session."""
        if folder.file is None:
            raise ModelError(f"{folder.path}: not an ONNX folder.")
        self._file = folder.file
        self._session = open_session(
            folder.file, threads=threads, optimised=folder.record is not None, expected=expected or {}
        )
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        unknown = sorted(set(self.input_names) - {"input_ids", "attention_mask", "token_type_ids"})
        if unknown:
            raise ModelError(f"{folder.file}: the model takes {unknown[0]!r:.80}, which a text does not give.")

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens)."""
        try:
            logits = self._session.run(None, inputs)[0]
        except Exception as error:
            raise ModelError(f"{self._file}: ONNX Runtime cannot run it ({first_line(error):.200}).") from None
        if not isinstance(logits, np.ndarray) or not np.issubdtype(logits.dtype, np.floating):
            kind = logits.dtype if isinstance(logits, np.ndarray) else type(logits).__name__
            raise ModelError(f"{self._file}: the first output must be floating-point logits, got {kind}.")
        return logits


def open_session(
    file: Path,
    *,
    threads: int | None = None,
    optimised: bool = False,
    expected: Mapping[str, str] | None = None,
) -> Any:
    """Open an ONNX Runtime session on the CPU. The runtime gets bytes that were read and checked here, and no path."""
    try:
        import onnxruntime
    except ImportError:
        raise KdLoraError(
            "onnxruntime is not installed: pip install 'kdlora[onnx]' ('kdlora[serve]' to predict only)"
        ) from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A plan of memory for each shape pays off where shapes repeat; texts have hundreds of shapes.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads or default_threads()
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = read_onnx(file)
    for name, content in {file.name: model.graph, **model.data}.items():
        check_hash(file.parent / name, content, expected or {})
    try:
        if model.data:
            sizes = [len(content) for content in model.data.values()]
            options.add_external_initializers_from_files_in_memory(list(model.data), list(model.data.values()), sizes)
        session = onnxruntime.InferenceSession(model.graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error):.200}). "
            "The file is damaged or was made for another runtime; export it again."
        ) from None
    session._model_bytes = b""  # kept for a change of providers, which never comes: the whole file a second time
    return session


def default_threads() -> int:
    """Give the threads that PyTorch would use: `OMP_NUM_THREADS`, else one a core that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _recorded_hashes(folder: ModelFolder) -> Mapping[str, str]:
    """Give the hashes that an export recorded, and compare the JSON files, already read, with theirs."""
    record = folder.record or {}
    if not is_sealed_or_old(record):
        raise ArtifactError(f"{folder.path / EXPORT_RECORD}: edited since the export. Export the model again.")
    hashes: Mapping[str, str] = record.get("sha256") or {}
    for name in (CONFIG_FILE, TOKENIZER_CONFIG):
        _compare(folder.path / name, folder.digests.get(name, "none"), hashes)
    return hashes


def check_hash(path: Path, content: bytes, expected: Mapping[str, str]) -> None:
    """Compare what was read from a file with the hash that an export recorded for it, if it did."""
    if path.name in expected:
        _compare(path, hashlib.sha256(content).hexdigest(), expected)


def _compare(path: Path, found: str, expected: Mapping[str, str]) -> None:
    wanted = expected.get(path.name, found)
    if found != wanted:
        raise ArtifactError(
            f"{path}: not the file that was exported: {EXPORT_RECORD} records sha256 {wanted[:12]}…, the file has "
            f"{found[:12]}…. Export the model again."
        )
