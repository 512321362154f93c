"""Many experiments in one process, and many epochs in one training, must not use more and more."""

import threading
from pathlib import Path

from kdlora.config import TeacherTrainConfig
from kdlora.data.load import load_splits
from kdlora.experiment.run import run_experiment
from kdlora.experiment.stages import train_teacher
from kdlora.system.environment import read_memory


def footprint() -> tuple[int, int, int]:
    """Open files, threads, and resident MiB of this process."""
    level = read_memory()
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), (level.anonymous >> 20) if level else 0


def test_experiments_leave_nothing_open(workshop, tmp_path):
    """A search of a hundred experiments in one process ends with `too many open files`, hours later."""
    points = []
    for number in range(3):
        assert not run_experiment(workshop.config(), tmp_path / str(number)).failed
        points.append(footprint())
    files, threads, memory = zip(*points[1:], strict=True)
    assert len(set(files)) == 1, points
    assert len(set(threads)) == 1, points
    assert memory[-1] - memory[0] <= 8, points


def test_epochs_keep_memory_and_checkpoints_bounded(workshop, tmp_path):
    """State that grows with the epochs, and checkpoints that are never removed, fill memory and disk in a night."""
    config = workshop.config()
    splits = load_splits(config.task, config.data)
    points, checkpoints = [], []

    def note(event) -> None:
        if float(event.epoch).is_integer():
            points.append(footprint())
            checkpoints.append(len(list(tmp_path.glob("step-*"))))

    settings = TeacherTrainConfig(epochs=40, batch_size=32, learning_rate=1e-4)
    train_teacher(str(workshop.teacher), splits, settings, folder=tmp_path, device="cpu", progress=note)
    assert len(points) >= 40
    files, threads, memory = zip(*points[10:], strict=True)
    assert max(files) - min(files) == 0
    assert max(threads) - min(threads) == 0
    assert memory[-1] - memory[0] <= 8
    assert max(checkpoints) <= 1
