"""What a run was made with: library versions, machine, state of the working tree."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "kdlora",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "tokenizers",
    "safetensors",
    "numpy",
    "scikit-learn",
    "scipy",
)


def collect_versions() -> dict[str, str]:
    """Read the installed versions of Python and of the libraries that decide a run's numbers.

    Returns:
        Package name to version; a package that is not installed is left out. Nothing is imported.
    """
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, str]:
    """Describe processor, cores, memory and system, without the host's name.

    Returns:
        `cpu`, `cores` (those this process may use), `memory` (GiB), `os` and `architecture`, as text.
    """
    return {
        "cpu": _processor_name(),
        "cores": str(_usable_cores()),
        "memory": _memory(),
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }


def git_state(folder: str | Path | None = None) -> dict[str, str]:
    """Read commit and cleanliness of the working tree around a folder.

    Args:
        folder: any folder of the tree; the current one by default.

    Returns:
        `commit` and `dirty` ("yes" or "no"); empty outside a repository, without commits or without git.
    """
    place = Path(folder) if folder is not None else Path.cwd()
    commit = _git(place, "rev-parse", "HEAD")
    changes = _git(place, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"commit": commit, "dirty": "yes" if changes else "no"}


def _git(folder: Path, *arguments: str) -> str | None:
    """Ask git one question; None where git or the repository is missing."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def _processor_name() -> str:
    """Read the model name where Linux gives one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    """Count the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> str:
    """State the machine's memory in GiB."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return "unknown"
    return f"{size / 2**30:.1f} GiB"
