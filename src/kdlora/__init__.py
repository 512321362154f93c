"""kdlora: distil a fine-tuned encoder into a small, fast classifier with LoRA, with the evidence.

The public names are imported on first use, so that `import kdlora` costs nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

# ruff: noqa: I001 - a public name beside its re-export
if TYPE_CHECKING:
    from kdlora.asking.ask import AskSummary as AskSummary, ask as ask, plan_asking as plan_asking
    from kdlora.asking.asksettings import AskSettings as AskSettings
    from kdlora.asking.audit import Audit as Audit
    from kdlora.config import (
        Config as Config,
        DataConfig as DataConfig,
        DistilConfig as DistilConfig,
        LoraSettings as LoraSettings,
        StudentTrainConfig as StudentTrainConfig,
        TaskConfig as TaskConfig,
        TeacherTrainConfig as TeacherTrainConfig,
    )
    from kdlora.configfile import build_config as build_config, load_config as load_config, load_search as load_search
    from kdlora.data.batches import WordCollator as WordCollator
    from kdlora.data.load import Splits as Splits, load_splits as load_splits
    from kdlora.data.tags import Words as Words
    from kdlora.data.tasks import Task as Task
    from kdlora.deploy.benchmark import benchmark as benchmark
    from kdlora.deploy.calibrate import fit_temperature as fit_temperature
    from kdlora.deploy.cascade import Cascade as Cascade
    from kdlora.deploy.export import export_onnx as export_onnx
    from kdlora.deploy.gates import LabelledTexts as LabelledTexts
    from kdlora.deploy.hub import push_experiment as push_experiment
    from kdlora.deploy.predict import Classifier as Classifier, Prediction as Prediction
    from kdlora.deploy.redact import redact as redact, redact_file as redact_file
    from kdlora.deploy.stream import predict_file as predict_file
    from kdlora.deploy.tagger import Entity as Entity, Tagger as Tagger
    from kdlora.distil.distillation_trainer import DistillationTrainer as DistillationTrainer
    from kdlora.distil.logits import TeacherLogits as TeacherLogits, attach_teacher as attach_teacher
    from kdlora.distil.losses import distillation_loss as distillation_loss
    from kdlora.distil.train import Trained as Trained
    from kdlora.distil.teacher_table import read_teacher_table as read_teacher_table
    from kdlora.distil.inference import teacher_logits as teacher_logits
    from kdlora.errors import (
        ArtifactError as ArtifactError,
        ConfigError as ConfigError,
        DataError as DataError,
        KdLoraError as KdLoraError,
        ModelError as ModelError,
    )
    from kdlora.experiment.stages import train_student as train_student, train_teacher as train_teacher
    from kdlora.extras import MissingExtraError as MissingExtraError
    from kdlora.experiment.deferral import defer_experiment as defer_experiment
    from kdlora.experiment.fitting import fit_thresholds as fit_thresholds
    from kdlora.experiment.labelling import (
        LabelSettings as LabelSettings,
        LabelSummary as LabelSummary,
        label_collection as label_collection,
    )
    from kdlora.experiment.run import ExperimentResult as ExperimentResult, run_experiment as run_experiment
    from kdlora.experiment.scoring import evaluate as evaluate
    from kdlora.experiment.search import SearchResult as SearchResult, run_search as run_search
    from kdlora.experiment.suite import SuiteResult as SuiteResult, run_suite as run_suite
    from kdlora.experiment.suitefile import load_suite as load_suite
    from kdlora.models.adapters import merge_student as merge_student
    from kdlora.models.encoders import load_encoder as load_encoder, load_fine_tuned as load_fine_tuned
    from kdlora.report.compare import compare as compare
    from kdlora.report.report import make_report as make_report
    from kdlora.terminal import live_progress as live_progress

# Read where these packages are imported: else they tell their makers what is done with them, under a lasting number.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# Imports may ask for GPUs (of transformers, beside flash-attn); no fork of a process that has begun CUDA can use it.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

_NAMES = {
    "kdlora.asking.ask": "AskSummary ask plan_asking",
    "kdlora.asking.asksettings": "AskSettings",
    "kdlora.asking.audit": "Audit",
    "kdlora.config": "Config DataConfig DistilConfig LoraSettings StudentTrainConfig TaskConfig TeacherTrainConfig",
    "kdlora.configfile": "build_config load_config load_search",
    "kdlora.data.batches": "WordCollator",
    "kdlora.data.load": "Splits load_splits",
    "kdlora.data.tags": "Words",
    "kdlora.data.tasks": "Task",
    "kdlora.deploy.benchmark": "benchmark",
    "kdlora.deploy.calibrate": "fit_temperature",
    "kdlora.deploy.cascade": "Cascade",
    "kdlora.deploy.export": "export_onnx",
    "kdlora.deploy.gates": "LabelledTexts",
    "kdlora.deploy.hub": "push_experiment",
    "kdlora.deploy.predict": "Classifier Prediction",
    "kdlora.deploy.redact": "redact redact_file",
    "kdlora.deploy.stream": "predict_file",
    "kdlora.deploy.tagger": "Entity Tagger",
    "kdlora.distil.distillation_trainer": "DistillationTrainer",
    "kdlora.distil.logits": "TeacherLogits attach_teacher",
    "kdlora.distil.losses": "distillation_loss",
    "kdlora.distil.inference": "teacher_logits",
    "kdlora.distil.teacher_table": "read_teacher_table",
    "kdlora.distil.train": "Trained",
    "kdlora.errors": "ArtifactError ConfigError DataError KdLoraError ModelError",
    "kdlora.experiment.stages": "train_student train_teacher",
    "kdlora.experiment.deferral": "defer_experiment",
    "kdlora.experiment.fitting": "fit_thresholds",
    "kdlora.experiment.labelling": "LabelSettings LabelSummary label_collection",
    "kdlora.experiment.run": "ExperimentResult run_experiment",
    "kdlora.experiment.scoring": "evaluate",
    "kdlora.experiment.search": "SearchResult run_search",
    "kdlora.experiment.suite": "SuiteResult run_suite",
    "kdlora.experiment.suitefile": "load_suite",
    "kdlora.extras": "MissingExtraError",
    "kdlora.models.adapters": "merge_student",
    "kdlora.models.encoders": "load_encoder load_fine_tuned",
    "kdlora.report.compare": "compare",
    "kdlora.report.report": "make_report",
    "kdlora.terminal": "live_progress",
}
"""Each module to its public names; `tests/test_public_api.py` compares them with what type checkers read above."""
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("kdlora")
    if name not in _HOMES:
        raise AttributeError(f"module 'kdlora' has no attribute {name!r}")
    from kdlora.extras import extras_named

    with extras_named(f"kdlora.{name}"):
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
