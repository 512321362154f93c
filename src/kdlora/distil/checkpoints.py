"""Checkpoints of a training: all that the next step depends on, in files that run no code when they are read."""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdlora.distil.fingerprints import compare, hash_file
from kdlora.distil.sharding import put
from kdlora.errors import ArtifactError
from kdlora.evidence.integrity import is_sealed_or_old, seal
from kdlora.evidence.records import atomic_file, atomic_folder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_MANIFEST = "manifest.json"
_PREFIX = "step-"
_MEANING = {
    "model": "the model or its initial weights",
    "train": "the training rows or their teacher logits",
    "validation": "the validation rows",
    "settings": "the training settings, the number of processes, or whether they share the model out",
    "distil": "the distillation settings",
    "lora": "the adapter's settings",
    "task": "the task",
    "seed": "the seed",
    "precision": "the number format",
    "device": "the kind of device",
    "rows_per_epoch": "the number of rows in an epoch",
}


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint.

    Attributes:
        folder: its files, checksums verified.
        state: what JSON holds.
    """

    folder: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Read a file of tensors.

        Args:
            name: as given to `CheckpointFolder.write`.
        """
        return load_file(self.folder / f"{name}.safetensors")


class CheckpointFolder:
    """The checkpoints of one training, and its best weights so far."""

    def __init__(self, folder: Path, ingredients: Mapping[str, Any], keep: int = 1) -> None:
        """Name the place; nothing is written yet.

        Args:
            folder: of this training alone.
            ingredients: hash or value of all that makes the training.
            keep: newest checkpoints to keep.
        """
        self.folder = folder
        self.ingredients = dict(ingredients)
        self.keep = keep
        self.best = folder / "best.safetensors"

    def latest(self) -> Checkpoint | None:
        """Find the newest whole checkpoint; unfinished or damaged ones are passed over.

        What a killed process was writing goes: nobody else writes here, and it may be as large as the model.

        Raises:
            ArtifactError: it is of another training.
        """
        for leftover in self.folder.glob(f".{_PREFIX}*.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for folder in reversed(self._folders()):
            manifest = _read_manifest(folder)
            if manifest is None:
                logger.warning("%s is unfinished or damaged; it is not used", folder)
                continue
            changed = compare(manifest["ingredients"], self.ingredients)
            if changed:
                named = ", ".join(_MEANING.get(name, name) for name in changed)
                raise ArtifactError(
                    f"{folder}: this checkpoint is of another training: {named} changed. Delete {self.folder} to "
                    "train anew, or choose another output folder"
                )
            return Checkpoint(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))
        return None

    def newest(self) -> Path | None:
        """Name the newest checkpoint, whole or not; None where there is none."""
        return next(reversed(self._folders()), None)

    def write(self, step: int, documents: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> Path:
        """Write a checkpoint; it counts once it is whole. Older ones go.

        Args:
            step: optimiser steps so far.
            documents: file name to what JSON holds, NaN and infinities included; `state` is one of them.
            tensors: file name to tensors.

        Returns:
            Its folder.
        """
        place = self.folder / f"{_PREFIX}{step:09d}"
        with atomic_folder(place) as temporary:
            for name, content in documents.items():
                (temporary / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            for name, values in tensors.items():
                save_tensors(temporary / f"{name}.safetensors", values)
            if self.best.is_file():
                _link(self.best, temporary / self.best.name)
            digests = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
            manifest = {"schema_version": SCHEMA_VERSION, "ingredients": self.ingredients, "sha256": digests}
            (temporary / _MANIFEST).write_text(json.dumps(seal(manifest), indent=2), encoding="utf-8")
        for folder in self._folders()[: -self.keep]:
            shutil.rmtree(folder, ignore_errors=True)
        return place

    def save_best(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the weights of now as the best so far.

        Args:
            tensors: from `trained_tensors`, whole.
        """
        with atomic_file(self.best) as temporary:
            save_tensors(temporary, tensors)

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Bring back the best weights as of a checkpoint; later ones belong to steps that are done again.

        Args:
            checkpoint: to continue from.
        """
        self.best.unlink(missing_ok=True)
        if (checkpoint.folder / self.best.name).is_file():
            _link(checkpoint.folder / self.best.name, self.best)

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_PREFIX}*")) if self.folder.is_dir() else []


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Args:
        path: the file.
        tensors: on any device.
    """
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name all that training changes: trainable parameters, and buffers that are part of the model.

    Args:
        model: with or without an adapter.
    """
    return {
        name: value for name, value in _current(model) if not isinstance(value, nn.Parameter) or value.requires_grad
    }


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put saved values into a model, in place.

    Args:
        model: as it was when they were saved, shared out or not.
        tensors: from `trained_tensors`, whole.

    Raises:
        ArtifactError: of another model.
    """
    current = trained_tensors(model)
    if current.keys() != tensors.keys() or any(current[name].shape != tensors[name].shape for name in tensors):
        different = sorted(current.keys() ^ tensors.keys())[:3] or "shapes"
        raise ArtifactError(f"the stored weights are of another model: {different} differ")
    for name, value in tensors.items():
        put(current[name], value)


def _current(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters once each, and the buffers that a saved model holds."""
    yield from model.named_parameters()
    saved = model.state_dict().keys()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in saved)


def pack_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimiser's state into tensors and JSON.

    Args:
        state: its `state_dict()`.

    Returns:
        Tensors named `<parameter>.<quantity>`, and the rest.
    """
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {"param_groups": state["param_groups"], "state": {}}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                rest["state"].setdefault(str(index), {})[name] = value
    return tensors, rest


def unpack_optimizer(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `pack_optimizer`.

    Args:
        tensors: its first part.
        rest: its second.
    """
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in rest["state"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = [
        {key: tuple(value) if key == "betas" else value for key, value in group.items()}
        for group in rest["param_groups"]
    ]
    return {"state": state, "param_groups": groups}


def pack_random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Take the state of every global random generator.

    Returns:
        Tensors, and what JSON holds.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {
        "python": [version, list(words), gauss],
        "numpy": [str(name), int(position), int(has_gauss), float(cached)],
    }


def unpack_random_state(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Set every global random generator.

    Args:
        tensors: the first part of `pack_random_state`.
        rest: the second.
    """
    version, words, gauss = rest["python"]
    random.setstate((version, tuple(words), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    cuda = [tensors[f"cuda.{index}"] for index in range(sum(key.startswith("cuda.") for key in tensors))]
    if cuda and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(cuda)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest where it and every file it names are whole."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        whole = (
            manifest["schema_version"] == SCHEMA_VERSION
            and is_sealed_or_old(manifest)
            and all(hash_file(folder / name) == digest for name, digest in manifest["sha256"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole and "ingredients" in manifest else None


def _link(source: Path, target: Path) -> None:
    """Share the file's blocks where the disk can; best.safetensors is only ever replaced, never changed."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
