"""kdlora: distil a fine-tuned encoder into a small, fast classifier with LoRA, with the evidence.

The public names are imported on first use, so that `import kdlora` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdlora.config import Config, DistilConfig, LoraConfig, StudentTrainConfig, TeacherTrainConfig
    from kdlora.configfile import build_config, load_config, load_search
    from kdlora.data.load import load_splits
    from kdlora.data.tasks import Task
    from kdlora.deploy.benchmark import benchmark
    from kdlora.deploy.calibrate import fit_temperature
    from kdlora.deploy.export import export_onnx
    from kdlora.deploy.hub import push_experiment
    from kdlora.deploy.predict import Classifier
    from kdlora.deploy.stream import predict_file
    from kdlora.distil.distillation_trainer import DistillationTrainer
    from kdlora.distil.losses import distillation_loss
    from kdlora.distil.tables import read_teacher_table
    from kdlora.distil.teacher import teacher_logits
    from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError, ModelError
    from kdlora.experiment.arms import evaluate, train_student, train_teacher
    from kdlora.experiment.labelling import label_collection
    from kdlora.experiment.run import run_experiment
    from kdlora.experiment.search import run_search
    from kdlora.experiment.suite import run_suite
    from kdlora.experiment.suitefile import load_suite
    from kdlora.models.adapters import merge_student
    from kdlora.models.encoders import load_encoder, load_fine_tuned
    from kdlora.report.compare import compare
    from kdlora.report.report import make_report
    from kdlora.terminal import live_progress

_HOMES = {
    "ArtifactError": "kdlora.errors",
    "Classifier": "kdlora.deploy.predict",
    "Config": "kdlora.config",
    "ConfigError": "kdlora.errors",
    "DataError": "kdlora.errors",
    "DistilConfig": "kdlora.config",
    "DistillationTrainer": "kdlora.distil.distillation_trainer",
    "KdLoraError": "kdlora.errors",
    "LoraConfig": "kdlora.config",
    "ModelError": "kdlora.errors",
    "StudentTrainConfig": "kdlora.config",
    "Task": "kdlora.data.tasks",
    "TeacherTrainConfig": "kdlora.config",
    "benchmark": "kdlora.deploy.benchmark",
    "build_config": "kdlora.configfile",
    "compare": "kdlora.report.compare",
    "distillation_loss": "kdlora.distil.losses",
    "evaluate": "kdlora.experiment.arms",
    "export_onnx": "kdlora.deploy.export",
    "fit_temperature": "kdlora.deploy.calibrate",
    "label_collection": "kdlora.experiment.labelling",
    "live_progress": "kdlora.terminal",
    "load_config": "kdlora.configfile",
    "load_encoder": "kdlora.models.encoders",
    "load_fine_tuned": "kdlora.models.encoders",
    "load_search": "kdlora.configfile",
    "load_splits": "kdlora.data.load",
    "load_suite": "kdlora.experiment.suitefile",
    "make_report": "kdlora.report.report",
    "merge_student": "kdlora.models.adapters",
    "predict_file": "kdlora.deploy.stream",
    "push_experiment": "kdlora.deploy.hub",
    "read_teacher_table": "kdlora.distil.tables",
    "run_experiment": "kdlora.experiment.run",
    "run_search": "kdlora.experiment.search",
    "run_suite": "kdlora.experiment.suite",
    "teacher_logits": "kdlora.distil.teacher",
    "train_student": "kdlora.experiment.arms",
    "train_teacher": "kdlora.experiment.arms",
}

__all__ = [
    "ArtifactError",
    "Classifier",
    "Config",
    "ConfigError",
    "DataError",
    "DistilConfig",
    "DistillationTrainer",
    "KdLoraError",
    "LoraConfig",
    "ModelError",
    "StudentTrainConfig",
    "Task",
    "TeacherTrainConfig",
    "benchmark",
    "build_config",
    "compare",
    "distillation_loss",
    "evaluate",
    "export_onnx",
    "fit_temperature",
    "label_collection",
    "live_progress",
    "load_config",
    "load_encoder",
    "load_fine_tuned",
    "load_search",
    "load_splits",
    "load_suite",
    "make_report",
    "merge_student",
    "predict_file",
    "push_experiment",
    "read_teacher_table",
    "run_experiment",
    "run_search",
    "run_suite",
    "teacher_logits",
    "train_student",
    "train_teacher",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("kdlora")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
