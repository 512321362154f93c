"""The folder that an export writes: tokenizer, config and record beside the graph."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

from kdlora.data.tasks import Task
from kdlora.deploy.folder import EXPORT_RECORD, ModelFolder, read_json
from kdlora.errors import ArtifactError
from kdlora.evidence.environment import collect_versions
from kdlora.evidence.integrity import hash_file
from kdlora.evidence.storage import write_json_atomic

_COPIES = 6
"""Graphs that exist at once while a stage is made: the stage before, the new one, and the tools' temporary ones."""


def check_target(to: Path, folder: ModelFolder) -> Path:
    """Refuse to replace what is not an export, and a disk that is too small.

    Args:
        to: the folder to write.
        folder: the model to export.

    Raises:
        ArtifactError: the target holds something else, or is the model itself.
        OSError: too little space.
    """
    target = to.absolute()
    source = folder.path.absolute()
    if target == source or target in source.parents:
        raise ArtifactError(f"{to}: the export would replace the model {folder.path}; give another folder.")
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{to}: expected a folder to write, got a file.")
    if target.is_dir() and any(target.iterdir()) and not (target / EXPORT_RECORD).is_file():
        raise ArtifactError(f"{to}: the folder is not empty and holds no earlier export; give a new folder.")
    place = next(parent for parent in (target, *target.parents) if parent.exists())
    free, needed = shutil.disk_usage(place).free, _COPIES * folder.size_bytes
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"the export needs about {needed / 1e6:,.0f} MB of free space for a while, there are {free / 1e6:,.0f} MB",
            str(to),
        )
    return target


def start_package(work: Path, folder: ModelFolder, tokenizer: Any) -> None:
    """Write tokenizer and config, so that every stage is judged with the files that are shipped.

    Args:
        work: the new folder.
        folder: the model that is exported.
        tokenizer: as transformers loads it; its limit becomes that of the export.
    """
    tokenizer.model_max_length = folder.max_length
    tokenizer.save_pretrained(work)
    write_json_atomic(work / "config.json", read_json(folder.path / "config.json"))


def finish_package(work: Path, folder: ModelFolder, task: Task, keep: dict[str, Path], record: dict[str, Any]) -> None:
    """Put the graphs that are kept in their place, remove the others, and write the record.

    Args:
        work: the new folder.
        folder: the model that was exported.
        task: what it was judged on.
        keep: file name to the graph that gets it.
        record: what the export has to say about itself.
    """
    for name, path in keep.items():
        path.replace(work / name)
    for path in work.glob("*.onnx"):
        if path.name not in keep:
            path.unlink()
    names = (*keep, "tokenizer.json")
    write_json_atomic(
        work / EXPORT_RECORD,
        {
            "schema_version": 1,
            "source": folder.path.name,
            "source_sha256": {path.name: hash_file(path) for path in sorted(folder.path.glob("*.safetensors"))},
            "task": task.to_dict(),
            "max_length": folder.max_length,
            "temperature": folder.temperature,
            "sha256": {name: hash_file(work / name) for name in names},
            "size_bytes": {name: (work / name).stat().st_size for name in keep},
            **record,
            "versions": collect_versions(),
        },
    )
