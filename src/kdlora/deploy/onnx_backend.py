"""Run an ONNX file on the CPU; the runtime gets bytes that were read and checked here, and opens no file itself.

A graph may name files of weights, anywhere on the machine; such a graph is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.deploy.folder import CONFIG_FILE, EXPORT_RECORD, TOKENIZER, ModelFolder
from kdlora.errors import ArtifactError, first_line
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.system.environment import default_threads
from kdlora.system.integrity import is_sealed_or_old


class OnnxBackend:
    """ONNX Runtime on the CPU."""

    def __init__(self, folder: ModelFolder, *, threads: int | None = None, verify: bool = False) -> None:
        """Open a session, and compare every file that decides an answer with the hash that the export recorded."""
        file = folder.file or folder.path
        expected = recorded_hashes(folder) if verify else {}
        self.tokenizer_json = read_tokenizer(folder, expected)
        self._session = open_session(file, threads=threads, optimised=folder.record is not None, expected=expected)
        self.input_names = tuple(value.name for value in self._session.get_inputs())

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        return self._session.run(None, inputs)[0]


def open_session(
    file: Path, *, threads: int | None = None, optimised: bool = False, expected: Mapping[str, str] | None = None
) -> Any:
    """Open an ONNX Runtime session; a graph that was optimised before is taken as it is."""
    import onnxruntime  # here: PyTorch folders are served without it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A plan of memory for each shape pays off where shapes repeat; texts have hundreds of shapes.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads or default_threads()
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    graph = read_onnx(file)
    check_hash(file, graph, expected or {})
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"{file}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error):.200}). "
            "The file is damaged or was made for another runtime; export it again."
        ) from None
    session._model_bytes = b""  # kept for a change of providers, which never comes: the whole file a second time
    return session


def recorded_hashes(folder: ModelFolder) -> Mapping[str, str]:
    """Give the hashes that an export recorded, and compare the JSON files, already read, with theirs."""
    record = folder.record or {}
    if not is_sealed_or_old(record):
        raise ArtifactError(f"{folder.path / EXPORT_RECORD}: edited since the export. Export the model again.")
    hashes: Mapping[str, str] = record.get("sha256") or {}
    if hashes and folder.file is not None and folder.file.name not in hashes:
        raise ArtifactError(
            f"{folder.file}: no part of the export in this folder, whose {EXPORT_RECORD} does not name it. Remove it, "
            "or load it with verify=False if it is meant."
        )
    for name in (CONFIG_FILE, TOKENIZER_CONFIG):
        check_hash(folder.path / name, folder.digests.get(name, "none"), hashes)
    return hashes


def read_tokenizer(folder: ModelFolder, expected: Mapping[str, str]) -> str:
    """Read the tokenizer of an export, which must be the one that was exported."""
    content = (folder.path / TOKENIZER).read_bytes()
    check_hash(folder.path / TOKENIZER, content, expected)
    return content.decode("utf-8", errors="replace")


def check_hash(path: Path, content: bytes | str, expected: Mapping[str, str]) -> None:
    """Compare a file's content, or what it hashed to, with the hash that an export recorded for it, if it did."""
    wanted = expected.get(path.name)
    if wanted is None:
        return
    found = content if isinstance(content, str) else hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise ArtifactError(
            f"{path}: not the file that was exported: {EXPORT_RECORD} records sha256 {wanted[:12]}…, the file has "
            f"{found[:12]}…. Export the model again."
        )


def read_onnx(file: Path) -> bytes:
    """Read a graph that holds its weights; one in ONNX Runtime's own format could name other files, too."""
    graph = file.read_bytes()
    if graph[4:8] == b"ORTM":
        raise ArtifactError(f"{file}: it is in ONNX Runtime's own format, which may name other files; save it as ONNX")
    if re.search(rb"[\0\x08]location", graph):  # the key as it is encoded, after its length
        raise ArtifactError(
            f"{file}: expected an ONNX file with its weights in it; these lie in other files. If they are meant, save "
            f"it as one file: `onnx.save(onnx.load({file.name!r}), {file.name!r})`."
        )
    return graph
