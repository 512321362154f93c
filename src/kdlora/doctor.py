"""What a bug report needs: versions, device, threads, free memory, the Hub, and which extras are missing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from http.client import HTTPException
from importlib import metadata
from pathlib import Path

from huggingface_hub import constants
from packaging.requirements import Requirement

from kdlora.errors import counted, harmless
from kdlora.system.environment import collect_versions, describe_machine, read_proc


@dataclass(frozen=True)
class Diagnosis:
    """The state of an installation, without user, host or folder: free GiB, and what `extras` lack."""

    versions: dict[str, str]
    machine: dict[str, str]
    device: str
    threads: int | None
    free_memory: float | None
    free_disk: float
    hub: str
    extras: dict[str, tuple[str, ...]]
    problems: tuple[str, ...]

    def lines(self) -> dict[str, str]:
        lines = {
            "versions": ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "machine": ", ".join(f"{name} {value}" for name, value in self.machine.items()),
            "device": self.device + ("" if self.threads is None else f", {counted(self.threads, 'CPU thread')}"),
            "free": f"memory {self.free_memory or '?'} GiB, disk of the Hub's cache {self.free_disk} GiB",
            "hub": self.hub,
        }
        for name, unmet in self.extras.items():
            more = f" and {len(unmet) - 2} more" if len(unmet) > 2 else ""
            lack = f"lacks {'; '.join(unmet[:2])}{more}: pip install 'kdlora[{name}]'"
            lines[f"extra {name}"] = lack if unmet else "complete"
        return lines | {"problems": "; ".join(self.problems) or "none"}


def diagnose(*, hub_seconds: float = 4.0) -> Diagnosis:
    """Look at the installation and the machine; nothing is changed."""
    required, extras = unmet_requirements()
    problems = [f"{need} is not met" for need in required]
    device, threads = "unknown", None
    try:
        device, threads = _device()
    except (ImportError, OSError, RuntimeError) as error:
        problems.append(f"PyTorch cannot be used: {error}")
    cache = Path(constants.HF_HUB_CACHE).absolute()
    there = next(place for place in (cache, *cache.parents) if os.access(place, os.F_OK))
    memory = read_proc("meminfo").get("MemAvailable")
    return Diagnosis(
        versions=collect_versions(),
        machine=describe_machine(),
        device=device,
        threads=threads,
        free_memory=round(int(memory.split()[0]) / 2**20, 1) if memory else None,
        free_disk=round(shutil.disk_usage(there).free / 2**30, 1),
        hub=harmless(_ask_hub(hub_seconds)),  # a mirror's address may hold a password
        extras=extras,
        problems=tuple(problems),
    )


def unmet_requirements() -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Compare what is installed with what kdlora's own metadata ask for: the base, and each extra."""
    try:
        needs = [Requirement(text) for text in metadata.requires("kdlora") or []]
        names = metadata.metadata("kdlora").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return ("the package kdlora itself (pip install kdlora)",), {}
    base = _unmet(need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""}))
    extras = {}
    for name in sorted(names):
        unmet = _unmet(need for need in needs if need.marker and need.marker.evaluate({"extra": name}))
        extras[name] = tuple(need for need in unmet if need not in base)
    return base, extras


def _unmet(requirements: Iterable[Requirement]) -> tuple[str, ...]:
    unmet = []
    for need in requirements:
        try:
            found = metadata.version(need.name)
            state = "" if need.specifier.contains(found, prereleases=True) else f"{found} is installed"
        except metadata.PackageNotFoundError:
            state = "not installed"
        unmet += [f"{need.name}{need.specifier} ({state})"] if state else []
    return tuple(unmet)


def _device() -> tuple[str, int | None]:
    if importlib.util.find_spec("torch") is None:
        return "cpu, by ONNX Runtime alone", None
    import torch  # here: the rest of the diagnosis must come even where torch is broken

    threads = torch.get_num_threads()
    if torch.cuda.is_available():
        traits = torch.cuda.get_device_properties(0)
        more = f", and {torch.cuda.device_count() - 1} more" if torch.cuda.device_count() > 1 else ""
        return f"cuda: {traits.name}, {traits.total_memory / 2**30:.1f} GiB{more}", threads
    if torch.version.cuda is None and torch.version.hip is None and shutil.which("nvidia-smi"):
        return (
            "cpu: an NVIDIA driver is here, but this PyTorch is built without CUDA (pytorch.org/get-started)",
            threads,
        )
    return "cpu (Apple's mps is not used)" if torch.backends.mps.is_available() else "cpu", threads


def _ask_hub(seconds: float) -> str:
    if constants.HF_HUB_OFFLINE:
        return "not asked: HF_HUB_OFFLINE is set"
    endpoint = constants.ENDPOINT
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds):
            return f"{endpoint} answers"
    except urllib.error.HTTPError as error:  # an answer, too: a stand-in need not have a front page
        return f"{endpoint} answers" if error.code < 500 else f"{endpoint} answers with {error.code}"
    except (OSError, ValueError, HTTPException) as error:
        return f"{endpoint} (HF_ENDPOINT) cannot be reached ({getattr(error, 'reason', error)})"
