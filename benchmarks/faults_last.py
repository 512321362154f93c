"""Long runs: resident memory, open files and threads over 200 epochs, and over 20 experiments in one process."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from faults_workshop import append, build_workshop, read_lines

from kdlora.config import TeacherTrainConfig
from kdlora.data.load import load_splits
from kdlora.experiment.arms import train_arm
from kdlora.experiment.run import run_experiment
from kdlora.models.encoders import load_encoder
from kdlora.system.environment import read_memory


def footprint() -> dict[str, int]:
    """Read resident bytes, open files and threads of this process."""
    level = read_memory()
    return {
        "resident": 0 if level is None else level.anonymous,
        "files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": threading.active_count(),
    }


def endure(out: Path, *, epochs: int = 200, experiments: int = 20, until: float = float("inf")) -> None:
    """Measure both, each in one go.

    Args:
        out: folder of the results.
        epochs: of the one training.
        experiments: one after the other.
        until: by the monotonic clock; nothing new begins after it.
    """
    results = out / "last.jsonl"
    done = {line["what"] for line in read_lines(results)}
    workshop = build_workshop(out / "workshop")
    if "epochs" not in done and time.monotonic() < until:
        append(results, {"what": "epochs", "points": _train(workshop, out / "epochs", epochs)})
    if "experiments" not in done and time.monotonic() < until:
        append(results, {"what": "experiments", "points": _repeat(workshop, out / "experiments", experiments)})


def _train(workshop: object, folder: Path, epochs: int) -> list[dict[str, int]]:
    """Train in this process; checkpoints all the time, so that their number shows too."""
    config = workshop.config()  # type: ignore[attr-defined]
    splits = load_splits(config.task, config.data)
    points: list[dict[str, int]] = []
    seen: set[float] = set()

    def note(event: object) -> None:
        epoch = float(event.epoch)  # type: ignore[attr-defined]
        if epoch.is_integer() and epoch not in seen:
            seen.add(epoch)
            points.append({"epoch": int(epoch), **footprint(), "checkpoints": len(list(folder.glob("step-*")))})

    settings = TeacherTrainConfig(epochs=epochs, batch_size=8, learning_rate=1e-4)
    encoder = load_encoder(str(workshop.teacher), splits.task, seed=0)  # type: ignore[attr-defined]
    train_arm(encoder, splits, settings, folder=folder, device="cpu", checkpoint_seconds=0.01, progress=note)
    return points


def _repeat(workshop: object, folder: Path, experiments: int) -> list[dict[str, int]]:
    config = workshop.config({"run": {"arms": ["kd-lora"]}})  # type: ignore[attr-defined]
    points = []
    for number in range(experiments):
        run_experiment(config, folder / str(number))
        points.append({"experiment": number + 1, **footprint()})
    return points
