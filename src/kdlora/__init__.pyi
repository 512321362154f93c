"""The public names and their homes, for type checkers, for editors and for `__init__.py`."""

# ruff: noqa: I001 - a public name beside its re-export
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
from kdlora.distil.inference import teacher_logits as teacher_logits
from kdlora.distil.logits import TeacherLogits as TeacherLogits, attach_teacher as attach_teacher
from kdlora.distil.losses import distillation_loss as distillation_loss
from kdlora.distil.teacher_table import read_teacher_table as read_teacher_table
from kdlora.distil.train import Trained as Trained
from kdlora.errors import (
    ArtifactError as ArtifactError,
    ConfigError as ConfigError,
    DataError as DataError,
    KdLoraError as KdLoraError,
    ModelError as ModelError,
)
from kdlora.experiment.deferral import defer_experiment as defer_experiment, fit_thresholds as fit_thresholds
from kdlora.experiment.labelling import (
    LabelSettings as LabelSettings,
    LabelSummary as LabelSummary,
    label_collection as label_collection,
)
from kdlora.experiment.run import ExperimentResult as ExperimentResult, run_experiment as run_experiment
from kdlora.experiment.scoring import evaluate as evaluate
from kdlora.experiment.search import SearchResult as SearchResult, run_search as run_search
from kdlora.experiment.stages import train_student as train_student, train_teacher as train_teacher
from kdlora.experiment.suite import SuiteResult as SuiteResult, run_suite as run_suite
from kdlora.experiment.suitefile import load_suite as load_suite
from kdlora.extras import MissingExtraError as MissingExtraError
from kdlora.models.adapters import merge_student as merge_student
from kdlora.models.encoders import load_encoder as load_encoder, load_fine_tuned as load_fine_tuned
from kdlora.report.compare import compare as compare
from kdlora.report.report import make_report as make_report
from kdlora.terminal import live_progress as live_progress

__version__: str
