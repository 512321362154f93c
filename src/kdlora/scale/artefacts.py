"""Where a suite's weights lie: in its folder, or behind a URL where nodes share no file system."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from kdlora.errors import ConfigError
from kdlora.scale.jobs import Job, Outcome, carry_out
from kdlora.scale.plan import PlannedRun

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
        shutil.rmtree(run.layout(self._root).teacher, ignore_errors=True)


class RemoteFolder:
    """A folder behind an fsspec URL (`s3://bucket/suite`), with files in place of a suite's local ones."""

    def __init__(self, url: str) -> None:
        """Open the file system of a URL.

        Args:
            url: as fsspec has it; its driver (such as s3fs) must be installed.

        Raises:
            ConfigError: an unknown scheme, or a driver that is not installed.
        """
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
        """Say whether a file or folder is there.

        Args:
            name: relative.
        """
        return bool(self._system.exists(f"{self._path}/{name}"))

    def pull(self, name: str, root: Path, *, ending: str = "") -> int:
        """Copy the files below a folder to the same place below a local one.

        Args:
            name: relative.
            root: the local folder.
            ending: of the files' names; empty for all.

        Returns:
            How many files were copied.
        """
        if not self.exists(name):
            return 0
        found = [path for path in self._system.find(f"{self._path}/{name}") if path.endswith(ending)]
        for path in found:
            target = root / path[len(self._path) :].lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self._system.get_file(path, str(target))
        return len(found)

    def push(self, root: Path, name: str) -> None:
        """Copy a local file, or the files below a local folder, to the same place here; a record goes last.

        Args:
            root: the local folder.
            name: relative.
        """
        place = root / name
        files = [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else [place]
        kept = [path for path in files if not set(_NOT_KEPT) & set(path.relative_to(place).parts)]
        for path in sorted(kept, key=lambda one: (one.name == "run.json", str(one))):
            if not path.name.startswith("."):
                target = f"{self._path}/{path.relative_to(root).as_posix()}"
                self._system.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                self._system.put_file(str(path), target)


def carry_out_away(job: Job, root: Path, url: str) -> Outcome:
    """Carry out a job on a node that shares no folder with the others: fetch the teacher, work, send the results.

    Args:
        job: its folders lie below `root`.
        root: the suite's folder where it was planned.
        url: where weights and records go.
    """
    remote = RemoteFolder(url)
    scratch = Path(tempfile.gettempdir()) / f"kdlora-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    scratch.mkdir(parents=True, exist_ok=True)
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
            shutil.rmtree(scratch / folder / "teacher", ignore_errors=True)
        remote.push(scratch, f"{folder}/config.yaml")
        remote.push(scratch, job.key)
        shutil.rmtree(scratch / job.key, ignore_errors=True)  # other seeds may be under way beside it
    return replace(outcome, job=job)


def _fetch_teacher(job: Job, root: Path, remote: RemoteFolder, scratch: Path) -> None:
    """Bring a teacher to this node, once for all the runs that it teaches here."""
    name = job.layout.teacher.relative_to(root).as_posix()
    mark = scratch / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}-{job.kind}.teacher"
    with FileLock(mark.with_suffix(".lock")):
        if mark.exists() and mark.read_text(encoding="utf-8") == job.teacher:
            return
        shutil.rmtree(scratch / name, ignore_errors=True)
        remote.pull(name, scratch)
        mark.write_text(job.teacher, encoding="utf-8")


def _moved(job: Job, root: Path, scratch: Path) -> Job:
    """Put a job's folders below another one."""

    def move(path: Path | None) -> Path | None:
        return None if path is None else scratch / path.relative_to(root)

    layout = replace(job.layout, root=scratch / job.layout.root.relative_to(root))
    layout = replace(layout, shared_teacher=move(job.layout.shared_teacher))
    config, given = job.config, job.config.teacher.fine_tuned
    if given is not None:
        update: dict[str, Any] = {"fine_tuned": str(move(Path(given)))}
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update=update)})
    return replace(job, layout=layout, config=config)
