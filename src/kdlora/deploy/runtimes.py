"""The ways to run an export: which files in which runtime, and which of them is the fastest on this machine.

A benchmark of an export stores its figures beside the files, by processor and cores. They are never pushed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, TypeAdapter, ValidationError

from kdlora.deploy import Runtime
from kdlora.deploy.decisions import read_decisions
from kdlora.deploy.folder import EXPORT_RECORD, MEASURED, Precision, Way, read_model_folder
from kdlora.errors import ArtifactError, ModelError
from kdlora.system.environment import describe_machine
from kdlora.system.integrity import hash_file
from kdlora.system.storage import write_json_atomic


@dataclass(frozen=True)
class _Speeds:
    runtime: Runtime
    precision: Precision
    texts_per_second: Annotated[dict[PositiveInt, PositiveFloat], Field(min_length=1)]  # by batch size


@dataclass(frozen=True)
class _Measured:
    export: str  # SHA-256 of the record of the export that was measured
    machines: dict[str, tuple[_Speeds, ...]]


def ways_to_run(folder: Path) -> list[Way]:
    """List the ways to run an export that passed its checks, and for which its thresholds and promise were fitted."""
    if not (folder / EXPORT_RECORD).is_file():
        return []
    ways = [Way(folder, precision="fp32"), Way(folder, precision="int8")]
    if importlib.util.find_spec("openvino") is not None:
        from kdlora.deploy.openvino_backend import has_bf16

        half: tuple[Precision, ...] = ("bf16",) if has_bf16() else ()
        ways += [Way(folder, "openvino", precision) for precision in ("fp32", *half, "int8")]
    found = []
    for way in ways:
        with contextlib.suppress(ModelError):  # no such file, not passed, or thresholds or a promise of another way
            described = read_model_folder(way)
            read_decisions(described)
            if described.file is not None:  # PyTorch reads the folder's weights where the export's file is not there
                found.append(way)
    return found


def store_speeds(speeds: Mapping[Way, Mapping[int, float]]) -> None:
    """Keep the texts a second of the ways to run one export by batch size, beside those of other machines."""
    folder = next(iter(speeds)).folder
    own = tuple(_Speeds(way.runtime, way.precision, dict(found)) for way, found in speeds.items())
    machines = _read(folder) | {_machine(): own}
    write_json_atomic(folder / MEASURED, asdict(_Measured(hash_file(folder / EXPORT_RECORD), machines)))


def fastest_way(folder: Path, precision: Precision, batch_size: int) -> Way:
    """Choose by the figures of such a machine; ONNX Runtime where there are none of this export."""
    best, most = Way(folder, "onnxruntime", precision), 0.0
    measured = _read(folder).get(_machine(), ())
    ways = [way for way in ways_to_run(folder) if precision in ("auto", way.precision)] if measured else []
    for row in measured:
        nearest = min(row.texts_per_second, key=lambda size: abs(math.log(size / batch_size)))
        way = Way(folder, row.runtime, row.precision)
        if way in ways and row.texts_per_second[nearest] > most:
            best, most = way, row.texts_per_second[nearest]
    return best


def _read(folder: Path) -> dict[str, tuple[_Speeds, ...]]:
    """Give by machine what was measured of the export that is there now."""
    path, record = folder / MEASURED, folder / EXPORT_RECORD
    if not path.is_file() or not record.is_file():
        return {}
    try:
        found = TypeAdapter(_Measured).validate_json(path.read_bytes())
    except ValidationError:
        raise ArtifactError(f"{path}: damaged. Remove it, and measure again: kdlora benchmark {folder}") from None
    return found.machines if found.export == hash_file(record) else {}


def _machine() -> str:
    machine = describe_machine()
    return f"{machine['cpu']}, {machine['cores']} cores"
