"""Read an ONNX file and the data beside it whole, so that the runtime gets checked bytes and opens no file.

A graph names the files of its large weights. Such a name may be absolute, lead up, or be a link: which files a graph
names is found here, by a walk over the encoded message, since the `onnx` package is not needed to predict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kdlora.errors import ArtifactError
from kdlora.foreign import is_plain_name

_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
    "entry": {1: "key", 2: "value"},
}
"""Numbers of the fields of `onnx.proto` that lead to a tensor's `external_data`, by kind of message."""
_VARINT, _FIXED_64, _BYTES, _FIXED_32 = 0, 1, 2, 5


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model in memory.

    Attributes:
        graph: content of the file.
        data: name to content of the files of weights that the graph names.
    """

    graph: bytes
    data: dict[str, bytes]


def read_onnx(file: Path) -> OnnxFile:
    """Read a graph and the weights beside it."""
    graph = file.read_bytes()
    try:
        if graph[4:8] == b"ORTM":  # a format of ONNX Runtime's own, with names of files that are not looked at here
            raise ValueError("it is in ONNX Runtime's own format")
        names = sorted(set(_external_names(graph)))
    except (ValueError, IndexError) as fault:
        raise ArtifactError(f"{file}: ONNX Runtime cannot load it: no ONNX file ({fault})") from None
    return OnnxFile(graph, {name: _beside(file, name).read_bytes() for name in names})


def _beside(file: Path, name: str) -> Path:
    """Find the file of weights that a graph names, in the graph's own folder."""
    path = file.parent / name
    if not is_plain_name(name):
        raise ArtifactError(f"{file}: its weights lie in {name!r:.80}; expected a file in the same folder")
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; {file.name} has its weights there. Copy both")
    folder, real = file.parent.resolve(), path.resolve()
    blobs = [parent.parent / "blobs" for parent in (folder, *folder.parents) if parent.name == "snapshots"]
    if real.parent not in (folder, *blobs):  # the Hub's cache links to the folder `blobs` beside `snapshots`
        raise ArtifactError(f"{path}: a link to a file in another folder; copy that file here if it is meant")
    return real


def _external_names(graph: bytes) -> Iterator[str]:
    """Give the `location` of every tensor whose values lie in another file."""
    todo: list[tuple[str, memoryview]] = [("model", memoryview(graph))]
    while todo:
        kind, message = todo.pop()
        texts: dict[str, bytes] = {}
        for number, content in _fields(message):
            child = _CHILDREN[kind].get(number)
            if child in _CHILDREN:
                todo.append((child, content))
            elif child is not None:
                texts[child] = bytes(content)
        if texts.get("key") == b"location":
            yield texts.get("value", b"").decode("utf-8")


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Give number and content of the fields that have a length; pass over the others."""
    place, end = 0, len(message)
    while place < end:
        tag, place = _varint(message, place)
        kind, size = tag & 7, 0
        if kind == _VARINT:
            _, place = _varint(message, place)
        elif kind == _BYTES:
            size, place = _varint(message, place)
        elif kind in (_FIXED_32, _FIXED_64):
            size = 4 if kind == _FIXED_32 else 8
        else:
            raise ValueError(f"an unknown kind of field at byte {place}")
        if place + size > end:
            raise ValueError("it is cut off")
        if kind == _BYTES:
            yield tag >> 3, message[place : place + size]
        place += size


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """Read a number of seven bits a byte; give it and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = message[place]
        value |= (byte & 127) << shift
        place += 1
        if byte < 128:
            return value, place
    raise ValueError(f"a number without end at byte {place}")
