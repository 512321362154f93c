"""What a classifier and a tagger have in common: a folder, its tokenizer, and the network, which is run in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, get_args

import numpy as np

from kdlora.deploy import Runtime
from kdlora.deploy.decisions import Decisions, Which, read_decisions
from kdlora.deploy.folder import CONFIG_FILE, TOKENIZER, ModelFolder, Precision, Way, read_model_folder
from kdlora.deploy.onnx_backend import OnnxBackend
from kdlora.errors import ArtifactError, ModelError, first_line
from kdlora.evidence.defer import shift_logits
from kdlora.extras import extras_named
from kdlora.foreign import panics_as_errors

if TYPE_CHECKING:
    from tokenizers import Encoding

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
"""Names of the arrays that a text becomes."""

BATCH_SIZE = 32
BATCH_TOKENS = 1024
"""Most padded tokens that one forward pass holds: enough to keep the cores busy, and memory small."""
_OF_WORDS = "its model marks entities, and gives no label of a text: kdlora predict, kdlora redact, kdlora.Tagger."
_OF_TEXTS = "its model gives labels of whole texts, and marks no entities: kdlora predict, kdlora.Classifier."
_ENCODED_CHARACTERS = 1 << 20
"""That are encoded at once: an encoding takes some 40 bytes a character and more, of what is cut off, too."""


@dataclass(frozen=True)
class Window:
    """A part of a text as tokens, special ones included."""

    ids: np.ndarray
    type_ids: np.ndarray
    text: int  # whose part it is
    words: Any = None  # that a tagger reads in it: their places among the words of all texts
    places: Any = None  # of their first tokens in the window

    def __len__(self) -> int:
        return len(self.ids)


class Backend(Protocol):
    """What runs the network."""

    input_names: tuple[str, ...]  # of the arrays that `run` takes
    tokenizer_json: str  # content of the `tokenizer.json` that goes with it

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens); what fails is told by the caller."""


class Network(ABC):
    """A described folder and its running network; never changed once it is made, so threads may share it."""

    marks_entities = False
    at_once = 1  # batches that are computed at the same time, each by a thread

    def __init__(self, folder: ModelFolder, backend: Backend, decisions: Decisions | None = None) -> None:
        if (folder.kind == "tokens") != self.marks_entities:
            raise ModelError(f"{folder.path}: {_OF_TEXTS if self.marks_entities else _OF_WORDS}")
        self.decisions = Decisions() if decisions is None else decisions
        self.label_names = folder.label_names
        self.folder, self.input_names, self._backend = folder, tuple(backend.input_names), backend
        if not {"input_ids"} <= set(self.input_names) <= set(INPUTS):
            taken = ", ".join(self.input_names)
            raise ModelError(f"{folder.path}: expected a model that takes {', '.join(INPUTS)}, got {taken:.200}.")
        self._tokenizer = _open_tokenizer(folder, backend.tokenizer_json)
        self._pad = _pad_token_id(folder, self._tokenizer)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        precision: Precision = "auto",
        runtime: Runtime = "onnxruntime",
        batch_size: int = BATCH_SIZE,
        threads: int | None = None,
        max_length: int | None = None,
        verify: bool = True,
        decisions: Which = "all",
        revision: str | None = None,
    ) -> Self:
        """Load a model folder, or a model of the Hub.

        Args:
            folder: a transformers folder, an exported folder or an `.onnx` file in it; or a Hub id `USER/REPO`, a
                folder in it as `USER/REPO/onnx`, each with `@REVISION` behind it if need be.
            precision: which ONNX file of a folder that has several; `auto` prefers int8. bf16 is fp32's in OpenVINO.
            runtime: what runs the files of an export; `auto` takes runtime and precision that were the fastest when
                `kdlora benchmark` measured the export on this host, and ONNX Runtime where it did not.
            batch_size: with `auto`, how many texts will be predicted at once.
            threads: of the network's products; by default `OMP_NUM_THREADS`, else one a core, within a container's CPU
                limit. With PyTorch this is process-wide, and by default PyTorch's own choice.
            max_length: cut texts to that many tokens; where long texts are read in windows, as by a tagger, tokens of
                a window. By default what the folder says.
            verify: compare every file of an export that decides an answer with the hash that the export recorded.
            decisions: what the folder of a classifier has of them. `all` says labels by the fitted thresholds, and
                gives none below the threshold of the promised error rate; `thresholds` defers nothing; `none` takes
                0.5, or the most probable label, and defers nothing, since a promise is of the answers by thresholds.
            revision: commit, tag or branch of a Hub id.

        Returns:
            The model, ready to predict.

        Raises:
            ModelError: not a model folder, an adapter, a model of another kind; decisions of other weights, a promise
                of texts that were cut at another `max_length`.
            ArtifactError: a file is damaged or is not the one that was exported.
            MissingExtraError: a PyTorch folder, and PyTorch or transformers is not installed.
        """
        if decisions not in get_args(Which):
            raise ModelError(f"decisions is all, thresholds or none; got {decisions!r}.")
        way = Way(Path(folder), runtime, precision, batch_size)
        described = find_model(way, revision=revision, max_length=max_length)
        return cls.open(described, threads=threads, verify=verify, decisions=decisions)

    from_pretrained = load

    @classmethod
    def open(
        cls, folder: ModelFolder, *, threads: int | None = None, verify: bool = True, decisions: Which = "all"
    ) -> Self:
        """Load a folder that was read before, with the settings of `load`."""
        if threads is not None and threads < 1:
            raise ModelError(f"threads must be at least 1, got {threads}.")
        if folder.backend == "onnx":
            backend: Backend = OnnxBackend(folder, threads=threads, verify=verify)
        elif folder.backend == "openvino":  # each runtime is imported here, so that no other has to be installed
            with extras_named("the runtime OpenVINO"):
                from kdlora.deploy.openvino_backend import OpenvinoBackend

            backend = OpenvinoBackend(folder, threads=threads, verify=verify)
        else:
            export = "EXPERIMENT/student-onnx, USER/REPO/onnx"
            with extras_named(f"{folder.path}: a PyTorch model, unlike an export ({export}),"):
                from kdlora.deploy.torch_backend import TorchBackend

            backend = TorchBackend(folder, threads=threads)
        return cls(folder, backend, read_decisions(folder, decisions))

    def __repr__(self) -> str:
        folder, name = self.folder, str(self.folder.file or self.folder.path)
        return (
            f"{type(self).__name__}({name!r}, {folder.kind}, labels {list(self.label_names)}, {folder.backend}, "
            f"{folder.precision}, {folder.size_bytes / 1e6:.1f} MB, at most {folder.max_length} tokens)"
        )

    def encode(self, texts: Sequence[Any]) -> Iterator[Encoding]:
        """Turn texts into tokens, special ones included; few encodings are in memory at a time."""
        ends = np.cumsum([len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts])
        for _, some in groupby(zip(ends // _ENCODED_CHARACTERS, texts, strict=True), key=itemgetter(0)):
            try:
                with panics_as_errors():
                    found: list[Encoding] = self._tokenizer.encode_batch([text for _, text in some])
            except Exception as error:
                place = self.folder.path / TOKENIZER
                raise ArtifactError(f"{place}: the tokenizer fails on a text: {first_line(error)}") from None
            yield from found

    @abstractmethod
    def _check(self, texts: Any) -> list[Any]:
        """Give texts as this model reads them, or refuse one by its number."""

    @abstractmethod
    def _windows(self, texts: Sequence[Any]) -> list[Window]:
        """Cut checked texts into the windows that the model reads, one text after the other."""

    def batches(self, texts: Sequence[Any]) -> Iterator[dict[str, np.ndarray]]:
        """Give the arrays that the model takes, texts or their windows of like length together."""
        windows = self._windows(self._check(texts))
        for rows in length_batches(windows, BATCH_SIZE):
            yield self._fill([windows[row] for row in rows])

    def run_all(self, windows: Sequence[Window], batch_size: int) -> Iterator[tuple[list[int], np.ndarray]]:
        """Compute logits of windows, those of like length together, and say which ones these are of."""
        batches = length_batches(windows, batch_size)

        def run(rows: list[int]) -> tuple[list[int], np.ndarray]:
            return rows, self.run(self._fill([windows[row] for row in rows]))

        if self.at_once == 1:
            yield from map(run, batches)
        else:
            with ThreadPoolExecutor(self.at_once) as pool:
                yield from pool.map(run, batches)

    def _fill(self, windows: Sequence[Window]) -> dict[str, np.ndarray]:
        shape = len(windows), len(windows[-1])  # the longest is the last
        ids, mask, types = np.full(shape, self._pad, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for place, window in enumerate(windows):
            own = np.s_[place, : len(window)]
            ids[own], mask[own], types[own] = window.ids, 1, window.type_ids
        arrays = dict(zip(INPUTS, (ids, mask, types), strict=True))
        return {name: arrays[name] for name in self.input_names}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels), or (rows, tokens, labels), of int64 token arrays (rows, tokens)."""
        place = self.folder.file or self.folder.path
        try:
            logits = np.asarray(self._backend.run(inputs))
        except Exception as error:  # a config or a graph decides what is computed, and it may be anybody's
            if self.folder.file is None and "memory" in str(error):
                raise MemoryError(first_line(error)) from error
            raise ModelError(f"{place}: the model cannot run ({first_line(error):.200}).") from error
        shape = (*inputs["input_ids"].shape[: 1 + self.marks_entities], len(self.label_names))
        if not np.issubdtype(logits.dtype, np.floating) or logits.shape != shape:
            raise ModelError(
                f"{place}: config.json names {len(self.label_names)} labels, so the first output must be "
                f"floating-point logits of shape {shape}; got {logits.dtype} of shape {logits.shape}."
            )
        return logits

    def shift(self, logits: np.ndarray) -> np.ndarray:
        """Move logits so that their usual decision is the one by the fitted thresholds."""
        return shift_logits(logits, self.label_names, self.decisions.thresholds, self.folder.temperature)


def find_model(way: Way, *, revision: str | None = None, max_length: int | None = None) -> ModelFolder:
    """Read the folder, of a model of the Hub too, as it is run."""
    if not way.folder.exists():
        from kdlora.deploy.hub import locate_model  # here: what lies on this machine is served without it

        way = replace(way, folder=locate_model(way.folder, revision=revision))
    if way.batch_size < 1:
        raise ModelError(f"batch_size must be at least 1, got {way.batch_size}.")
    if way.runtime == "auto" and way.folder.is_dir():  # a file that is named is meant
        from kdlora.deploy.runtimes import fastest_way  # here: most know what they want

        described = read_model_folder(way)
        way = fastest_way(described.path, way.precision, way.batch_size)
        way = replace(way, runtime="openvino") if described.backend == "openvino" else way  # the only one that runs it
    return read_model_folder(way, max_length=max_length)


def length_batches(windows: Sequence[Window], batch_size: int) -> list[list[int]]:
    """Group windows of like length, so that little padding is computed; they are named by their place."""
    if batch_size < 1:
        raise ModelError(f"batch_size must be at least 1, got {batch_size}.")
    lengths = [*map(len, windows)]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    batches: list[list[int]] = []
    for row in order:
        current = batches[-1] if batches else None
        if current is None or len(current) >= batch_size or (len(current) + 1) * lengths[row] > BATCH_TOKENS:
            batches.append([row])
        else:
            current.append(row)
    return batches


def spread(texts: Sequence[Any], count: int) -> list[Any]:
    """Take some texts, evenly spaced."""
    return [texts[row] for row in np.linspace(0, len(texts) - 1, min(count, len(texts)), dtype=int)]


def _open_tokenizer(folder: ModelFolder, content: str) -> Any:
    """Read a tokenizer, and fix whether it truncates, and where."""
    from tokenizers import Tokenizer

    try:
        with panics_as_errors():
            tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises a bare one for a damaged file
        raise ArtifactError(f"{folder.path / TOKENIZER}: the tokenizer cannot be read: {error}") from None
    tokenizer.no_padding()
    if folder.kind == "tokens" or folder.windows is not None:
        tokenizer.no_truncation()
    else:
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
