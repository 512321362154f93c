"""Checkpoints of a training: all that the next step depends on, in files that run no code when they are read."""

from __future__ import annotations

import json
import logging
import random
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from kdlora.config import ROUNDING_KEYS
from kdlora.errors import ArtifactError, StaleError
from kdlora.system.integrity import compare, hash_file, is_sealed_or_old, seal
from kdlora.system.ownership import is_ours, remove, remove_abandoned
from kdlora.system.storage import atomic_file, atomic_folder, mark_folder

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 5
_MANIFEST = "manifest.json"
_NAME = re.compile(r"step-[0-9]{9}")
_BEST = "best.safetensors"
_MEANING = {
    "model": "the model or its initial weights",
    "train": "the training rows or their teacher logits",
    "validation": "the validation rows",
    "settings": "the training settings",
    "processes": "the number of processes",
    "distil": "the distillation settings",
    "lora": "the adapter's settings",
    "precision": "the number format",
    "device": "the kind of device",
    "rows_per_epoch": "the number of rows in an epoch",
    "copies": "the number of perturbed copies",
}


class OtherTrainingError(StaleError):
    """A checkpoint is of another training than the one that would go on from it."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: files with verified checksums, and the state that JSON holds."""

    folder: Path
    state: Mapping[str, Any]

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")


class CheckpointFolder:
    """The checkpoints of one training, and its best weights so far."""

    def __init__(self, folder: Path, ingredients: Mapping[str, Any], keep: int = 1) -> None:
        self.folder, self.ingredients, self.keep, self.best = folder, dict(ingredients), keep, folder / _BEST

    def latest(self) -> Checkpoint | None:
        """Find the newest whole checkpoint; what a killed process was writing, perhaps a whole model, goes."""
        if self.folder.is_dir():
            self._claim()
            remove_abandoned(self.folder, deep=False)
        for folder in reversed(self._folders()):
            manifest = _read_manifest(folder, whole=True)
            if manifest is None:
                logger.warning("%s is unfinished or damaged, or of an earlier version; it is not used", folder)
                continue
            self._refuse_others(folder, manifest["ingredients"])
            return Checkpoint(folder, json.loads((folder / "state.json").read_text(encoding="utf-8")))
        return None

    def write(self, step: int, documents: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write a checkpoint; it counts once it is whole. Older ones go, and later ones, which nothing could use."""
        self._claim()
        newest = self.folder / f"step-{step:09d}"
        with atomic_folder(newest) as temporary:
            for name, content in documents.items():
                (temporary / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
            for name, values in tensors.items():
                save_tensors(temporary / f"{name}.safetensors", values)
            if self.best.is_file():
                _link(self.best, temporary / self.best.name)
            digests = {path.name: hash_file(path) for path in sorted(temporary.iterdir())}
            manifest = {"schema_version": SCHEMA_VERSION, "ingredients": self.ingredients, "sha256": digests}
            (temporary / _MANIFEST).write_text(json.dumps(seal(manifest), indent=2), encoding="utf-8")
        folders = self._folders()
        kept = [folder for folder in folders if folder <= newest][-self.keep :]
        for folder in set(folders).difference(kept):
            remove(folder)

    def save_best(self, tensors: Mapping[str, Tensor]) -> None:
        self._claim()
        with atomic_file(self.best) as temporary:
            save_tensors(temporary, tensors)

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Bring back the best weights as of a checkpoint; later ones belong to steps that are done again."""
        remove(self.best)
        if (checkpoint.folder / self.best.name).is_file():
            _link(checkpoint.folder / self.best.name, self.best)

    def _folders(self) -> list[Path]:
        return sorted(filter(_is_checkpoint, self.folder.iterdir())) if self.folder.is_dir() else []

    def _claim(self) -> None:
        """Make the folder, in which the user may have files, one for checkpoints, unless it is ours already."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if is_ours(self.folder):
            return
        taken = [entry for entry in self.folder.iterdir() if _NAME.fullmatch(entry.name) or entry.name == _BEST]
        if taken and not any(_is_checkpoint(entry) and _read_manifest(entry) for entry in taken):
            raise ArtifactError(f"{taken[0]} has a name that checkpoints take; name another folder, or move it away")
        mark_folder(self.folder, "training")

    def _refuse_others(self, checkpoint: Path, ingredients: Mapping[str, Any]) -> None:
        changed = compare(_without_memory(ingredients), _without_memory(self.ingredients))
        if changed == ["processes"]:
            count = int(ingredients["processes"])
            way = "without a launcher" if count == 1 else f"with torchrun --nproc-per-node {count}"
            raise OtherTrainingError(
                f"{checkpoint}: processes that trained: {count}, now: {self.ingredients['processes']}, with which a "
                f"step would have other rows. Start the same command {way}, or delete {self.folder} to train anew"
            )
        if changed:
            named = ", ".join(_MEANING.get(name, f"the {name}") for name in changed)
            raise OtherTrainingError(
                f"{checkpoint}: this checkpoint is of another training: {named} changed. Delete {self.folder} to "
                "train anew, or choose another output folder"
            )


def _is_checkpoint(path: Path) -> bool:
    return bool(_NAME.fullmatch(path.name)) and not path.is_symlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name all that training changes: trainable parameters, and buffers that are part of a saved model."""
    saved = model.state_dict().keys()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    current = trained_tensors(model)
    if current.keys() != tensors.keys() or any(current[name].shape != tensors[name].shape for name in tensors):
        different = sorted(current.keys() ^ tensors.keys())[:3] or "shapes"
        raise StaleError(f"the stored weights are of another model: {different} differ")
    for name, value in tensors.items():
        current[name].copy_(value)


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Name what an optimiser remembers of its parameters; of its groups only the rate changes, by the schedule."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], rates: Iterable[float]) -> None:
    state = optimizer.state_dict()
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state["state"].setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def random_state() -> dict[str, Any]:
    """Take the state of every global random generator; of GPUs, of the one in use, for another day may see fewer."""
    name, keys, *rest = np.random.get_state(legacy=True)
    numpy = [name, np.asarray(keys).tolist(), *rest]
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state().tolist()}
    # A training on the CPU does not begin with CUDA here.
    return state | ({"cuda": torch.cuda.get_rng_state().tolist()} if torch.cuda.is_initialized() else {})


def restore_random_state(state: Mapping[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))


def _read_manifest(folder: Path, *, whole: bool = False) -> dict[str, Any] | None:
    """Read a manifest where it is one of ours and, where that is asked for, every file that it names is unharmed."""
    try:
        manifest: dict[str, Any] = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        ours = manifest["schema_version"] == SCHEMA_VERSION and "ingredients" in manifest and is_sealed_or_old(manifest)
        digests = manifest["sha256"].items() if whole else ()
        fits = ours and all(hash_file(folder / name) == digest for name, digest in digests)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return manifest if fits else None


def _without_memory(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    settings = ingredients.get("settings") or {}
    return {**ingredients, "settings": {key: one for key, one in settings.items() if key not in ROUNDING_KEYS}}


def _link(source: Path, target: Path) -> None:
    """Share the file's blocks where the disk can; best.safetensors is only ever replaced, never changed."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
