"""kdlora: distil a fine-tuned encoder into a small, fast classifier with LoRA, with the evidence.

The public names are imported on first use, so that `import kdlora` costs nothing.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlora.config import Config
    from kdlora.configfile import build_config, load_config
    from kdlora.data.load import load_splits
    from kdlora.data.tasks import Task
    from kdlora.distil.losses import distillation_loss
    from kdlora.distil.teacher import teacher_logits
    from kdlora.distil.trainer import DistillationTrainer
    from kdlora.errors import KdLoraError
    from kdlora.evidence.report import make_report
    from kdlora.experiment.arms import evaluate, train_student, train_teacher
    from kdlora.experiment.run import run_experiment
    from kdlora.models.adapters import merge_student

__version__ = version("kdlora")

_HOMES = {
    "Config": "kdlora.config",
    "DistillationTrainer": "kdlora.distil.trainer",
    "KdLoraError": "kdlora.errors",
    "Task": "kdlora.data.tasks",
    "build_config": "kdlora.configfile",
    "distillation_loss": "kdlora.distil.losses",
    "evaluate": "kdlora.experiment.arms",
    "load_config": "kdlora.configfile",
    "load_splits": "kdlora.data.load",
    "make_report": "kdlora.evidence.report",
    "merge_student": "kdlora.models.adapters",
    "run_experiment": "kdlora.experiment.run",
    "teacher_logits": "kdlora.distil.teacher",
    "train_student": "kdlora.experiment.arms",
    "train_teacher": "kdlora.experiment.arms",
}

__all__ = [
    "Config",
    "DistillationTrainer",
    "KdLoraError",
    "Task",
    "build_config",
    "distillation_loss",
    "evaluate",
    "load_config",
    "load_splits",
    "make_report",
    "merge_student",
    "run_experiment",
    "teacher_logits",
    "train_student",
    "train_teacher",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
