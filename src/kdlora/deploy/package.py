"""The folder that an export writes: tokenizer, config and record beside the graph."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path
from typing import Any

from kdlora.data.tasks import Task
from kdlora.deploy.folder import CONFIG_FILE, EXPORT_RECORD, TOKENIZER, ModelFolder
from kdlora.errors import ArtifactError, ModelError
from kdlora.foreign import read_json
from kdlora.models.settings import TOKENIZER_CONFIG
from kdlora.system.environment import collect_versions
from kdlora.system.integrity import hash_file, seal
from kdlora.system.ownership import remove
from kdlora.system.storage import plain_json, write_json_atomic

OPSET = 18
"""Of the standard operators: the exporter's own."""
_COPIES = 6
"""Graphs that exist at once while a stage is made: the stage before, the new one, and the tools' temporary ones."""
_MODEL_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|kdlora_export)\.json"
    r"|model(-[0-9]{5}-of-[0-9]{5})?\.safetensors|model\.safetensors\.index\.json|model(_quantized)?\.onnx([._]data)?"
    r"|vocab\.txt|merges\.txt|bpe\.codes|(spm|spiece|tokenizer|sentencepiece\.bpe)\.model|README\.md|LICENSE|NOTICE"
)


def is_model_file(path: Path) -> bool:
    """Say whether an entry of a model folder is a file that a model consists of, by its name; a link never is."""
    return bool(_MODEL_FILES.fullmatch(path.name)) and path.is_file() and not path.is_symlink()


def check_target(to: Path, folder: ModelFolder) -> Path:
    """Refuse to export an export, to replace what is none, and a disk that is too small."""
    if folder.backend != "transformers":
        raise ModelError(
            f"{folder.path}: expected a transformers folder (model.safetensors), got one that is exported already."
        )
    target = to.absolute()
    source = folder.path.absolute()
    if target == source or target in source.parents:
        raise ArtifactError(f"{to}: the export would replace the model {folder.path}; give another folder.")
    if target.exists() and not target.is_dir():
        raise ArtifactError(f"{to}: expected a folder to write, got a file.")
    if target.is_dir() and any(target.iterdir()) and not (target / EXPORT_RECORD).is_file():
        raise ArtifactError(f"{to}: the folder is not empty and holds no earlier export; give a new folder.")
    if target.is_dir() and (foreign := [entry.name for entry in target.iterdir() if not is_model_file(entry)]):
        raise ArtifactError(f"{to}: {foreign[0]} is no file of an export, and would be lost; give a new folder.")
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
    """Write tokenizer and config, so that every stage is judged with the files that are shipped."""
    tokenizer.model_max_length = folder.max_length
    tokenizer.save_pretrained(work)
    write_json_atomic(work / CONFIG_FILE, read_json(folder.path / CONFIG_FILE))


def finish_package(work: Path, folder: ModelFolder, task: Task, keep: dict[str, Path], record: dict[str, Any]) -> None:
    """Put the graphs that are kept in their place, remove the others, and write the record."""
    for name, path in keep.items():
        path.replace(work / name)
    for path in work.glob("*.onnx"):
        if path.name not in keep:
            remove(path)
    names = (*keep, TOKENIZER, TOKENIZER_CONFIG, CONFIG_FILE)
    content = {
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
    }
    write_json_atomic(work / EXPORT_RECORD, seal(plain_json(content)))
