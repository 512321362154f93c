"""Stand-ins for stages, which run in a process of their own and are found there by name."""

import os
import signal
from typing import Any

from kdlora.experiment import stages


def die_in_lora_arms(config: Any, layout: Any, arm: str, seed: int, progress: Any) -> Any:
    """Train as usual, but be killed as by the system where the arm has adapters."""
    if arm.endswith("lora"):
        os.kill(os.getpid(), signal.SIGKILL)
    return stages.train_run(config, layout, arm, seed, progress)
