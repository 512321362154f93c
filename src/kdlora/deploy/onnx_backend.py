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

    def __init__(self, folder: ModelFolder, *, threads: int | None, verify: bool) -> None:
        """Open a session, and compare every file that decides an answer with the hash that the export recorded."""
        self.tokenizer_json, graph, _ = read_export(folder, verify=verify)
        optimised = folder.record is not None
        self._session = open_session(graph, str(folder.file), threads=threads, optimised=optimised)
        self.input_names = tuple(value.name for value in self._session.get_inputs())

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        return self._session.run(None, inputs)[0]


def open_session(graph: bytes, name: str, *, threads: int | None = None, optimised: bool = False) -> Any:
    """Open an ONNX Runtime session; a graph that was optimised before is taken as it is."""
    import onnxruntime  # here: PyTorch folders are served without it

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # A plan of memory for each shape pays off where shapes repeat; texts have hundreds of shapes.
    options.enable_mem_pattern = False
    options.intra_op_num_threads = threads or default_threads()
    if optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"{name}: ONNX Runtime {onnxruntime.__version__} cannot load it ({first_line(error):.200}). "
            "The file is damaged or was made for another runtime; export it again."
        ) from None
    session._model_bytes = b""  # kept for a change of providers, which never comes: the whole file a second time
    return session


def read_export(folder: ModelFolder, *, verify: bool) -> tuple[str, bytes, bytes]:
    """Read the tokenizer, the graph and, of OpenVINO's form, its weights; all must be what was exported, if asked."""
    file = folder.file or folder.path
    weights = [file.with_suffix(".bin")] if file.suffix == ".xml" else []
    content = {path: path.read_bytes() for path in (folder.path / TOKENIZER, file, *weights)}
    if verify:
        _compare_with_record(folder, content)
    if not weights:
        _refuse_other_files(content[file], file)
    tokenizer, graph, *more = content.values()
    return tokenizer.decode("utf-8", errors="replace"), graph, b"".join(more)


def _compare_with_record(folder: ModelFolder, content: Mapping[Path, bytes]) -> None:
    """Refuse files that are not what an export recorded, the JSON files among them, which were read before."""
    record = folder.record or {}
    if not is_sealed_or_old(record):
        raise ArtifactError(f"{folder.path / EXPORT_RECORD}: edited since the export. Export the model again.")
    hashes: Mapping[str, str] = record.get("sha256") or {}
    if hashes and folder.file is not None and folder.file.name not in hashes:
        raise ArtifactError(
            f"{folder.file}: no part of the export in this folder, whose {EXPORT_RECORD} does not name it. Remove it, "
            "or load it with verify=False if it is meant."
        )
    found = {name: folder.digests.get(name, "none") for name in (CONFIG_FILE, TOKENIZER_CONFIG)}
    found |= {path.name: hashlib.sha256(value).hexdigest() for path, value in content.items()}
    for name, own in found.items():
        if own != (wanted := hashes.get(name, own)):
            raise ArtifactError(
                f"{folder.path / name}: not the file that was exported: {EXPORT_RECORD} records sha256 {wanted[:12]}…, "
                f"the file has {own[:12]}…. Export the model again."
            )


def _refuse_other_files(graph: bytes, file: Path) -> None:
    """Refuse a graph whose weights lie elsewhere; one in ONNX Runtime's own format could name other files, too."""
    if graph[4:8] == b"ORTM":
        raise ArtifactError(f"{file}: it is in ONNX Runtime's own format, which may name other files; save it as ONNX")
    if re.search(rb"[\0\x08]location", graph):  # the key as it is encoded, after its length
        raise ArtifactError(
            f"{file}: expected an ONNX file with its weights in it; these lie in other files. If they are meant, save "
            f"it as one file: `onnx.save(onnx.load({file.name!r}), {file.name!r})`."
        )
