"""What is ours, and the one place that removes anything: folders with our manifest, names that carry their owner."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from kdlora.errors import ArtifactError
from kdlora.foreign import is_special, read_json
from kdlora.system.integrity import is_sealed_or_old

logger = logging.getLogger(__name__)

MANIFEST = ".kdlora.json"
"""Says in a folder that kdlora made it, and for what."""
SCRATCH = "kdlora-scratch"
TRACKING = "tracking"
"""Folder of an experiment for the files of trackers, which make links of their own."""
_WANDB_LOG = "debug-core.log"
"""W&B's link to its log in the user's cache; through an older run's nothing is written."""
_MANIFESTS = (MANIFEST, "kdlora_export.json")
_SETTINGS = {"experiment": "config.yaml", "suite": "suite.yaml"}
_OWNER = r"(?P<place>[0-9a-f]{12})-(?P<process>[1-9][0-9]{0,9})-(?P<start>[0-9]{1,19})-[0-9a-f]{8}"
_OWNED = re.compile(rf"(?:\.(?P<target>.+)\.(?:tmp|(?P<old>old))|{SCRATCH})-{_OWNER}", re.ASCII | re.DOTALL)
_FOREIGN_SECONDS = 24 * 3600.0
"""Age at which what a process of another machine was writing counts as abandoned."""


def check_folder(folder: Path, kind: str) -> None:
    """See that a folder is new, empty, or ours and of this kind; nothing is changed."""
    refuse_file(folder)
    # What a call that came to nothing left in a new folder is no content.
    if not folder.exists() or all(entry.name == ".lock" or is_ours_by_name(entry) for entry in folder.iterdir()):
        return
    found = read_manifest(folder)
    if found is None and not _is_of_an_earlier_version(folder, kind):
        raise ArtifactError(
            f"{folder} is not empty and holds no {MANIFEST}, so it is no {kind}'s folder; name another, or empty it"
        )
    if found is not None and found["kind"] != kind:
        one, other = (f"{'an' if name.startswith('e') else 'a'} {name}" for name in (found["kind"], kind))
        raise ArtifactError(f"{folder} is the folder of {one}, not of {other}; name another")
    refuse_links(folder)


def refuse_foreign(folder: Path, manifest: str, what: str, *keys: str) -> Path:
    """Give a folder that is new, has hidden files alone, or holds a manifest (with these keys); nothing is changed."""
    refuse_file(folder)
    if (folder / manifest).is_file():
        refuse_links(folder)
        if keys and not read_json(folder / manifest).keys() >= set(keys):
            raise ArtifactError(f"{folder / manifest} is no record of {what}; name another folder with --to")
    elif any(not entry.name.startswith(".") for entry in folder.glob("*")):
        raise ArtifactError(f"{folder} is not empty and holds no {what}; name another with --to")
    return folder


def refuse_file(folder: Path) -> None:
    place = next(one for one in (folder, *folder.absolute().parents) if os.path.lexists(one))
    if not place.is_dir():
        raise ArtifactError(f"{place} is no folder; name one")


def refuse_links(folder: Path) -> None:
    """See that a folder of results holds files and folders alone: a link leads elsewhere, and a pipe never ends."""
    for place, folders, files in os.walk(folder):
        for entry in (Path(place, name) for name in (*folders, *files)):
            if entry.is_symlink() and not _is_of_a_tracker(entry, folder):
                raise ArtifactError(
                    f"{entry} is a link, and kdlora follows none among results; put what it names in its place"
                )
            if is_special(entry) and TRACKING not in entry.relative_to(folder).parts:
                raise ArtifactError(f"{entry} is neither a file nor a folder; remove it, and copy what belongs there")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read what a folder of ours says of itself; None where it is not ours."""
    path = folder / MANIFEST
    with contextlib.suppress(ArtifactError, OSError):
        content = {} if path.is_symlink() else read_json(path)
        if content.get("made_by") == "kdlora" and isinstance(content.get("kind"), str):
            return content
    return None


def _is_of_an_earlier_version(folder: Path, kind: str) -> bool:
    """Say whether a folder without manifest holds a record of ours beside its settings, as kdlora 0.1 left them."""
    if kind not in _SETTINGS or not (folder / _SETTINGS[kind]).is_file():
        return False
    with contextlib.suppress(ArtifactError, StopIteration, OSError):
        record = read_json(next(folder.glob("runs/*/run.json" if kind == "experiment" else "runs/*/*/runs/*/run.json")))
        return {"schema_version", "arm", "seed"} <= record.keys() and is_sealed_or_old(record)
    return False


def _is_of_a_tracker(link: Path, folder: Path) -> bool:
    """Say whether a link is one that trackers make: out of their own folder leads only the one to W&B's log."""
    parts = link.relative_to(folder).parts[:-1]
    if TRACKING not in parts:
        return False
    own = Path(folder, *parts[: parts.index(TRACKING) + 1])
    return link.name == _WANDB_LOG or Path(os.path.realpath(link)).is_relative_to(own.resolve())


def remove(path: Path) -> None:
    """Remove a file, a folder, or a link and not what it names; what is not there is no fault.

    The rule: it has a name of ours with its owner, or it carries our manifest, or it lies below such a folder without
    a link in between. All that kdlora removes goes through here.
    """
    if not os.path.lexists(path):
        return
    if not is_ours(path):
        raise ArtifactError(f"{path} was not made by kdlora and stays; move it away, or name another place")
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        logger.warning("%s could not be removed", path)


def is_ours(path: Path) -> bool:
    """Say whether kdlora may remove something, by the rule of `remove`."""
    place = path.absolute()
    if is_ours_by_name(place) or (_carries_manifest(place) and not place.is_symlink()):
        return True
    for folder in place.parents:
        if is_ours_by_name(folder) or _carries_manifest(folder):
            return True
        if folder.is_symlink() or folder.name == "..":
            break
    return False


def is_ours_by_name(path: Path) -> bool:
    """Say whether a name is one that only `owned_name` gives."""
    return bool(_OWNED.fullmatch(path.name))


def _carries_manifest(folder: Path) -> bool:
    return any((folder / name).is_file() and not (folder / name).is_symlink() for name in _MANIFESTS)


def owned_name() -> str:
    """Name this process by place, id and start, with a random end: ids alone are used again."""
    return f"{_place()}-{os.getpid()}-{_start_of(os.getpid()) or 0}-{secrets.token_hex(4)}"


@functools.cache
def _place() -> str:
    """Name where a process id means what it means here: the machine, its boot, and the namespace of its processes."""
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not Linux
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        known.append(str(Path("/proc/self/ns/pid").readlink()))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:12]


def _is_abandoned(path: Path, found: re.Match[str]) -> bool:
    """Say whether this user's process that made a file or folder is gone, so that nobody will finish it."""
    try:
        state = path.lstat()
    except OSError:
        return False
    if hasattr(os, "getuid") and state.st_uid != os.getuid():
        return False
    if found["place"] == _place() and (alive := _is_alive(int(found["process"]), int(found["start"]))) is not None:
        return not alive
    return time.time() - state.st_mtime > _FOREIGN_SECONDS  # of another machine, container or boot


def _is_alive(process: int, start: int) -> bool | None:
    """Say whether a process runs; None where nothing here can tell."""
    if not hasattr(os, "getuid"):  # on Windows, to ask by a signal is to end it
        with contextlib.suppress(ImportError, OverflowError):
            import psutil  # comes with what trains, which alone writes for hours

            return bool(psutil.pid_exists(process))
        return None
    try:
        os.kill(process, 0)  # signal 0 asks without sending anything
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return not start or _start_of(process) in (None, start)


def _start_of(process: int) -> int | None:
    """Read when a process started; None where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2]
        return int(fields.split()[19])
    except (OSError, ValueError, IndexError):
        return None


def remove_abandoned(folder: Path, *, deep: bool = True, of: str = "") -> None:
    """Remove what killed processes were writing in a folder, and put back what they had not replaced yet."""
    for place, folders, files in os.walk(folder):
        for found in filter(None, map(_OWNED.fullmatch, [*folders, *files])):
            path = Path(place, found.string)
            if (of and found["target"] != of) or not _is_abandoned(path, found):
                continue
            if found["old"] and not os.path.lexists(target := path.with_name(found["target"])):
                logger.info("putting back %s, which a process that was killed had not replaced yet", target)
                path.rename(target)
            else:
                logger.info("removing %s, left by a process that was killed", path)
                remove(path)
        folders[:] = [name for name in folders if deep and not is_ours_by_name(Path(name))]
