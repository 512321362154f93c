"""Run an ONNX file on the CPU; the runtime gets bytes that were read and checked here, and opens no file itself.

A graph names the files of its large weights. Such a name may be absolute, lead up, or be a link.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.deploy.folder import CONFIG_FILE, EXPORT_RECORD, TOKENIZER, ModelFolder
from kdlora.errors import ArtifactError, first_line
from kdlora.extras import extras_named
from kdlora.foreign import is_plain_name, leads_out
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
    graph, data = read_onnx(file)
    for name, content in {file.name: graph, **data}.items():
        check_hash(file.parent / name, content, expected or {})
    try:
        if data:
            options.add_external_initializers_from_files_in_memory(
                list(data), list(data.values()), [len(content) for content in data.values()]
            )
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


def read_onnx(file: Path) -> tuple[bytes, dict[str, bytes]]:
    """Read a graph, and by name the files of weights beside it."""
    graph = file.read_bytes()
    try:
        if graph[4:8] == b"ORTM":  # a format of ONNX Runtime's own, with names of files that are not looked at here
            raise ValueError("it is in ONNX Runtime's own format")
        names = sorted(set(_external_names(graph)))
    except ValueError as fault:
        raise ArtifactError(f"{file}: ONNX Runtime cannot load it: no ONNX file ({fault})") from None
    return graph, {name: _beside(file, name).read_bytes() for name in names}


def _beside(file: Path, name: str) -> Path:
    """Find the file of weights that a graph names, in the graph's own folder."""
    path = file.parent / name
    if not is_plain_name(name):
        raise ArtifactError(f"{file}: its weights lie in {name!r:.80}; expected a file in the same folder")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; {file.name} has its weights there. Copy both")
    if leads_out(path):
        raise ArtifactError(f"{path} is a link out of its folder; put what it names in its place if it is meant")
    return path.resolve()


def _external_names(graph: bytes) -> Iterator[str]:
    """Give the `location` of every tensor whose values lie in another file."""
    if not re.search(rb"[\0\x08]location", graph):  # the key as it is encoded, after its length
        return
    with extras_named("a graph with weights in a file of their own"):
        import onnx  # here: graphs without such a file are served without it
    try:
        todo: list[Any] = [onnx.load_model_from_string(graph)]
    except Exception as error:  # protobuf's
        raise ValueError(first_line(error)) from None
    while todo:
        message = todo.pop()
        for field, value in message.ListFields():
            if field.name == "external_data":
                yield from (entry.value for entry in value if entry.key == "location")
            elif field.message_type is not None:
                todo += value if isinstance(value, Sequence) else [value]
