"""Trackers of experiments, as transformers has them: one tracked run for each training, however often it is resumed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import TrainerCallback

from kdlora.errors import ConfigError
from kdlora.system.storage import write_text_atomic

_KEY = "kdlora.run"


@dataclass(frozen=True)
class TrackedRun:
    """How a training is called where it is tracked."""

    experiment: str
    name: str
    tags: Mapping[str, str]
    checkpoints: Path
    folder: Path
    """For the files of trackers that keep them on this machine."""

    @functools.cached_property
    def key(self) -> str:
        """Find it again when it is resumed: the key goes with the checkpoints, so what begins anew has another one."""
        file = self.checkpoints / "tracked"
        if not file.exists() or not any(self.checkpoints.glob("step-*")):
            write_text_atomic(file, secrets.token_hex(6))
        return file.read_text(encoding="utf-8")


def check_trackers(trackers: Sequence[str]) -> None:
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"run.report_to names {' and '.join(missing)}, not installed here; pip install {' '.join(missing)}, or "
            "leave it out"
        )


@contextlib.contextmanager
def tracked(trackers: Sequence[str], run: TrackedRun) -> Iterator[list[TrainerCallback]]:
    """Open a run with each tracker, and close it as done or failed."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    with contextlib.ExitStack() as opened:
        yield [_placeless(opened.enter_context(openers[name](run))) for name in trackers]


def _placeless(tracker: TrainerCallback) -> TrainerCallback:
    """Tell a tracker the last names of folders alone: their paths say who works here, and on what."""
    begin = tracker.on_train_begin

    def on_train_begin(args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
        told = [vars(one) for one in (args, model.config, *getattr(model, "peft_config", {}).values())]
        paths = [{key: text for key, text in one.items() if Path(str(text)).is_absolute()} for one in told]
        try:
            for one, places in zip(told, paths, strict=True):
                one.update({key: Path(text).name for key, text in places.items()})
            begin(args, state, control, model=model, **others)
        finally:
            for one, places in zip(told, paths, strict=True):
                one.update(places)

    tracker.on_train_begin = on_train_begin
    return tracker


@contextlib.contextmanager
def _tensorboard(run: TrackedRun) -> Iterator[TrainerCallback]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    place = os.environ.get("TENSORBOARD_LOGGING_DIR")
    folder = (Path(place, run.experiment) if place else run.folder / "tensorboard") / f"{run.name}-{run.key}"
    try:
        with SummaryWriter(log_dir=str(folder)) as writer:
            writer.add_text("tags", ", ".join(f"{name}: {value}" for name, value in run.tags.items()))
            yield TensorBoardCallback(writer)
    finally:  # any name will do, so that the host's need not be told; a killed process has left its own
        for path in folder.glob("events.out.tfevents.*"):
            path.rename(path.with_name(path.name.replace(f".{socket.gethostname()}.", ".unnamed.", 1)))


@contextlib.contextmanager
def _wandb(run: TrackedRun) -> Iterator[TrainerCallback]:
    import wandb
    from transformers.integrations import WandbCallback

    # Neither user, host, command, code nor remote is written down; versions of W&B name some of these keys otherwise.
    unnamed = {
        "disable_git": True,
        "save_code": False,
        "host": "unnamed",
        "username": "unnamed",
        "program": "kdlora",
        "x_disable_meta": True,
        "x_disable_machine_info": True,
        "x_disable_stats": True,
        "x_save_requirements": False,
        "_disable_meta": True,
        "_disable_stats": True,
    }
    known = {name for kind in wandb.Settings.__mro__ for name in vars(kind).get("__annotations__", {})}
    settings = {name: value for name, value in unnamed.items() if name in known}
    # Nothing leaves this machine unless WANDB_MODE says so; `wandb sync` sends it later.
    run.folder.mkdir(parents=True, exist_ok=True)
    opened = wandb.init(
        project=os.environ.get("WANDB_PROJECT") or run.experiment,
        name=run.name,
        id=run.key,
        resume="allow",
        mode=os.environ.get("WANDB_MODE", "offline"),
        dir=os.environ.get("WANDB_DIR") or str(run.folder),
        tags=[f"{name}:{value}" for name, value in run.tags.items()],
        settings=wandb.Settings(silent=True, console="off", **settings),
    )
    code = 1
    try:
        yield WandbCallback()
        code = 0
    finally:
        opened.finish(exit_code=code)


@contextlib.contextmanager
def _mlflow(run: TrackedRun) -> Iterator[TrainerCallback]:
    import mlflow
    from transformers.integrations import MLflowCallback

    run.folder.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{run.folder.resolve() / 'mlflow.db'}")
    with FileLock(run.folder / ".mlflow.lock"):  # of runs that begin at the same time, one makes the database
        experiment = mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.experiment)
    where = f"tags.`{_KEY}` = '{run.key}'"
    client = mlflow.MlflowClient()
    found: list[Any] = client.search_runs([experiment.experiment_id], where)
    # A run that the client makes names neither user nor command nor commit, as one that is started otherwise does.
    tags = {**run.tags, _KEY: run.key}
    one = found[0] if found else client.create_run(experiment.experiment_id, run_name=run.name, tags=tags)
    with mlflow.start_run(run_id=one.info.run_id):
        yield MLflowCallback()
