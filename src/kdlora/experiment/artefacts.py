"""Where a suite's weights lie: in its folder, or behind a URL where nodes share no file system."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from kdlora.errors import ArtifactError, ConfigError
from kdlora.experiment.jobs import Job, Outcome, carry_out
from kdlora.experiment.plan import PlannedRun
from kdlora.system.ownership import MANIFEST, mark_folder, read_manifest, remove
from kdlora.system.storage import atomic_file, write_text_atomic

_NOT_KEPT = ("checkpoints", "model")


class Shelf(Protocol):
    """Knows which teachers have their weights, and gives up those of beaten ones."""

    def has_teacher(self, run: PlannedRun) -> bool:
        """Say whether the weights of an `fft` run are there."""

    def drop_teacher(self, run: PlannedRun) -> None:
        """Delete them, and the logits with them."""


class FolderShelf:
    """The suite's own folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def has_teacher(self, run: PlannedRun) -> bool:
        """Say whether the weights of an `fft` run are there."""
        return run.layout(self._root).teacher.exists()

    def drop_teacher(self, run: PlannedRun) -> None:
        """Delete them, and the logits with them."""
        remove(run.layout(self._root).teacher)


class RemoteFolder:
    """A folder behind an fsspec URL (`s3://bucket/suite`), with files in place of a suite's local ones."""

    def __init__(self, url: str) -> None:
        """Open the file system of a URL."""
        import fsspec

        try:
            self._system, path = fsspec.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"--out {url}: {error}") from None
        self._path = str(path).rstrip("/")

    def has_teacher(self, run: PlannedRun) -> bool:
        """Say whether the weights of an `fft` run are there."""
        return self.exists(f"{run.folder}/teacher/config.json")

    def drop_teacher(self, run: PlannedRun) -> None:
        """Delete them, and the logits with them."""
        if self.exists(f"{run.folder}/teacher"):
            self._system.rm(f"{self._path}/{run.folder}/teacher", recursive=True)

    def exists(self, name: str) -> bool:
        """Say whether a file or folder is there."""
        return bool(self._system.exists(f"{self._path}/{name}"))

    def claim(self, root: Path) -> None:
        """See that the folder is empty, or one of a suite, and make it one."""
        there = self.exists("") and bool(self._system.ls(self._path, detail=False))
        if there and not self.exists(MANIFEST):
            raise ArtifactError(f"{self._path} is not empty and holds no {MANIFEST}, so it is no suite's; name another")
        self._system.makedirs(self._path, exist_ok=True)
        self._system.put_file(str(root / MANIFEST), f"{self._path}/{MANIFEST}")

    def pull(self, name: str, root: Path, *, ending: str = "") -> int:
        """Copy the files below a folder to the same place below a local one."""
        if not self.exists(name):
            return 0
        found = [path for path in self._system.find(f"{self._path}/{name}") if path.endswith(ending)]
        for path in found:
            with atomic_file(root / self._inner_name(path)) as temporary:
                self._system.get_file(path, str(temporary))
        return len(found)

    def _inner_name(self, path: str) -> str:
        """Give a name below this folder; one that would lead out of it is refused."""
        name = path.removeprefix(f"{self._path}/")
        if name == path or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise ArtifactError(f"{path!r} is no name for a file below {self._path}; who may write there?")
        return name

    def push(self, root: Path, name: str) -> None:
        """Copy a local file, or the files below a local folder, to the same place here; a record goes last."""
        place = root / name
        files = place.rglob("*") if place.is_dir() else [place]
        files = [path for path in files if path.is_file() and not path.is_symlink()]
        kept = [path for path in files if not set(_NOT_KEPT) & set(path.relative_to(place).parts)]
        for path in sorted(kept, key=lambda one: (one.name == "run.json", str(one))):
            if not path.name.startswith("."):
                target = f"{self._path}/{path.relative_to(root).as_posix()}"
                self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self._system.put_file(str(path), target)


def carry_out_away(job: Job, root: Path, url: str) -> Outcome:
    """Carry out a job on a node that shares no folder with the others: fetch the teacher, work, send the results."""
    remote = RemoteFolder(url)
    scratch = node_folder(url)
    folder = job.layout.root.relative_to(root).as_posix()
    if job.teacher:
        _fetch_teacher(job, root, remote, scratch)
    outcome = carry_out(_moved(job, root, scratch))
    if job.kind == "label":
        for logits in (scratch / folder / "teacher").iterdir() if outcome.error is None else ():
            if logits.is_dir():  # of the training rows and of the unlabelled ones; the weights are there
                remote.push(scratch, f"{folder}/teacher/{logits.name}")
    else:
        if job.arm == "fft" and outcome.error is None:
            remote.push(scratch, f"{folder}/teacher")
            remove(scratch / folder / "teacher")
        remote.push(scratch, f"{folder}/config.yaml")
        remote.push(scratch, job.key)
        remove(scratch / job.key)  # other seeds may be under way beside it
    return replace(outcome, job=job)


def node_folder(url: str) -> Path:
    """Make or find this node's own folder for the files of a suite; nobody else may write to it, or read it."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    folder = Path(tempfile.gettempdir()) / f"kdlora-{user}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
    found = folder.lstat()
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == user and not stat.S_IMODE(found.st_mode) & 0o077
    if not private and hasattr(os, "getuid"):
        raise ArtifactError(
            f"{folder} is there, but is no folder that this user alone may open, so others could exchange what is "
            "trained from; remove it, or set TMPDIR to a folder of your own"
        )
    if read_manifest(folder) is None:
        mark_folder(folder, "node")
    return folder


def _fetch_teacher(job: Job, root: Path, remote: RemoteFolder, scratch: Path) -> None:
    """Bring a teacher to this node, once for all the runs that it teaches here."""
    name = job.layout.teacher.relative_to(root).as_posix()
    mark = scratch / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{job.kind}.teacher"
    with FileLock(mark.with_suffix(".lock")):
        if mark.exists() and mark.read_text(encoding="utf-8") == job.teacher:
            return
        remove(scratch / name)
        remote.pull(name, scratch)
        write_text_atomic(mark, job.teacher)


def _moved(job: Job, root: Path, scratch: Path) -> Job:
    """Put a job's folders below another one."""

    def move(path: Path | None) -> Path | None:
        return None if path is None else scratch / path.relative_to(root)

    layout = replace(job.layout, root=scratch / job.layout.root.relative_to(root))
    layout = replace(layout, shared_teacher=move(job.layout.shared_teacher), shared_folder=scratch)
    config, given = job.config, job.config.teacher.fine_tuned
    if given is not None:
        update: dict[str, Any] = {"fine_tuned": str(move(Path(given)))}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=update)})
    return replace(job, layout=layout, config=config)
