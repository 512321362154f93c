"""Stand-ins for stages, which run in a process of their own and are found there by name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from kdlora.experiment import stages


def train_beside_another(config: Any, layout: Any, arm: str, seed: int, progress: Any) -> Any:
    """Note the GPU, wait until the run that should go on at the same time is there, and train as usual.

    The last control is killed.
    """
    if (arm, seed) == ("student-lora", 1):
        os.kill(os.getpid(), signal.SIGKILL)
    place = Path(os.environ["KDLORA_TEST_PLACE"])
    (place / f"{arm}-{seed}").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    pair = ["kd-lora-0", "kd-lora-1"] if arm == "kd-lora" else ["fft-0", "student-lora-0"]
    until = time.monotonic() + 60
    while not all((place / name).exists() for name in pair):
        if time.monotonic() > until:
            raise TimeoutError(f"{arm} with seed {seed} runs alone; expected {pair}")
        time.sleep(0.02)
    return stages.train_run(config, layout, arm, seed, progress)


def label_after_controls(config: Any, layout: Any, progress: Any) -> None:
    """Let the teacher label, unless a run that it is compared with still goes on."""
    ended = sorted(path.parent.name for path in layout.runs.glob("*/run.json"))
    if ended != ["fft-seed0", "student-lora-seed0", "student-lora-seed1"]:
        raise ValueError(f"only {ended} have ended")
    stages.label_training_rows(config, layout, progress)
