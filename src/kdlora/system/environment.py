"""What a run was made with: library versions, machine, state of the working tree; this process's memory; the cache."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES: tuple[str, ...] = ("kdlora", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers")
_PACKAGES += ("safetensors", "numpy", "scikit-learn", "scipy")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""A container's limit, processor time and period in microseconds, as "150000 100000"; "max 100000" is none."""


def cache_folder() -> Path:
    """Folder that keeps downloads: `KDLORA_CACHE`, else the user's cache folder."""
    if "KDLORA_CACHE" in os.environ:
        return Path(os.environ["KDLORA_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "kdlora"


def collect_versions() -> dict[str, str]:
    """Read the installed versions of Python and of the libraries that decide a run's numbers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def usable_cores() -> int:
    """Count the cores that this process may use, a container's limit included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, _CPU_QUOTA.read_text(encoding="utf-8").split())
        cores = max(1, min(cores, math.ceil(quota / period)))
    return cores


def default_threads() -> int:
    """Give `OMP_NUM_THREADS`, else a thread for each core that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else usable_cores()


def describe_machine() -> dict[str, str]:
    """Describe processor, cores, memory and system, without the host's name."""
    memory = "unknown"
    with contextlib.suppress(AttributeError, ValueError, OSError):
        memory = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    return {
        "cpu": read_proc("cpuinfo").get("model name") or platform.processor() or platform.machine(),
        "cores": str(usable_cores()),
        "memory": memory,
        "os": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
    }


def read_proc(name: str) -> dict[str, str]:
    """Read a file below /proc by its keys; empty where there is none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc", name).read_text(encoding="utf-8", errors="replace").splitlines()
        return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def git_state(folder: str | Path | None = None) -> dict[str, str]:
    """Read commit and cleanliness of the working tree around a folder."""
    asked = ("--path-format=absolute", "--git-common-dir", "--git-dir", "--show-toplevel", "HEAD")
    *places, commit = (_git(Path(folder or Path.cwd()), "rev-parse", *asked) or "").splitlines() or [""]
    if len(places) != 3:
        return {}
    common, own, tree = map(Path, places)
    with tempfile.TemporaryDirectory() as empty:  # compared by a repository whose settings name no programs to run
        for name in ("objects", "refs"):
            Path(empty, name).mkdir()
        Path(empty, "HEAD").write_text(f"{commit}\n", encoding="ascii")
        borrowed = {"GIT_DIR": empty, "GIT_OBJECT_DIRECTORY": str(common / "objects")}
        borrowed |= {"GIT_INDEX_FILE": str(own / "index"), "GIT_WORK_TREE": str(tree)}
        about = ("--porcelain", "--untracked-files=no", "--ignore-submodules=all")
        changes = _git(tree, "status", *about, **borrowed)
    return {} if changes is None else {"commit": commit, "dirty": "yes" if changes else "no"}


def _git(folder: Path, *arguments: str, **environment: str) -> str | None:
    """Ask git one question; None where git or the repository is missing."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}"]
    command += ["-C", str(folder), *arguments]
    settled = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")} | environment
    settled |= {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False, env=settled)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


@dataclass(frozen=True)
class MemoryLevel:
    """Memory of this process, bytes."""

    resident: int  # all of it that is in memory (`VmRSS`)
    anonymous: int  # its own pages, without those of mapped files (`RssAnon`)
    mapped: int  # pages of mapped files: libraries, and weights read through a map (`RssFile`)
    high_water: int  # the largest `resident` since the start or the last `forget_peak` (`VmHWM`)


def read_memory() -> MemoryLevel | None:
    fields = read_proc("self/status")
    with contextlib.suppress(KeyError):
        return MemoryLevel(*(int(fields[key].split()[0]) * 1024 for key in ("VmRSS", "RssAnon", "RssFile", "VmHWM")))
    return None


def forget_peak() -> None:
    """Let the high-water mark start again, and CUDA's; after loading, since weights are read through a map."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if (torch := _torch_on_cuda()) is not None:
        torch.cuda.reset_peak_memory_stats()


def peak_since(before: MemoryLevel | None) -> int | None:
    """Give the peak above an earlier level, without the files that a forked child maps anew, page by page."""
    if (torch := _torch_on_cuda()) is not None:
        return int(torch.cuda.max_memory_allocated())
    after = read_memory()
    if before is None or after is None:
        return None
    return max(0, after.high_water - after.mapped - before.anonymous)


def _torch_on_cuda() -> Any:
    """Give torch where this process has used CUDA; it is never imported for the question."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized() else None
