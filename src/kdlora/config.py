"""The configuration: what can be set, with its unit, its default and its limits."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator

from kdlora.defaults import FamilyName, RecipeName, fill_in
from kdlora.section import (
    MOST,
    SEEDS,
    DeferConfig,
    ExportConfig,
    Metric,
    OpenClassWeights,
    Section,
    without_later_keys,
)
from kdlora.section import DataConfig as DataConfig

Kind = Literal["single-label", "regression", "multi-label", "tokens"]
TrainedArm = Literal["fft", "lora", "kd-lora", "student-fft", "student-lora", "kd-fft"]
Arm = Literal["words", TrainedArm]
GlueName = Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]

ARMS: tuple[Arm, ...] = get_args(Arm)
TEACHER_ARMS: frozenset[Arm] = frozenset({"fft", "lora"})
LORA_ARMS: frozenset[Arm] = frozenset({"lora", "kd-lora", "student-lora"})
DISTILLED_ARMS: frozenset[Arm] = frozenset({"kd-lora", "kd-fft"})
STUDENT_ARMS: tuple[Arm, ...] = ("kd-lora", "kd-fft", "student-lora", "student-fft")
ROUNDING_KEYS = ("micro_batch_tokens", "gradient_checkpointing")
"""Keys that change figures as rounding, or other draws of a dropout, do; after a lack of memory others are taken."""
_LISTED = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
# The benchmark's own spelling (`SST-2`, `CoLA`) is accepted for a task.
_SPELT = BeforeValidator(
    lambda value: value.lower().replace("-", "").replace("_", "") if isinstance(value, str) else value
)
_NAMED = BeforeValidator(
    lambda value: [str(one) if type(one) is int else one for one in value] if isinstance(value, list | tuple) else value
)
Names = Annotated[tuple[str, ...], _NAMED, _LISTED]
_ANY = TypeAdapter(Any)


class TaskConfig(Section):
    """The task: columns, labels and kind."""

    name: Annotated[GlueName, _SPELT] | None = None
    """A GLUE task, whose columns, kind, labels and metrics are known. Leave it out for your own data."""
    kind: Kind | Literal["auto"] = "auto"
    """Kind of task. `auto` infers it from the labels where that is safe, and prints it."""
    text: Names | None = Field(default=None, min_length=1, max_length=2)
    """Text column, or the two columns of a pair of texts. For tokens the column of words, or of texts with spans."""
    label: Names | None = Field(default=None, min_length=1)
    """Label column. Several columns of 0 and 1 make a multi-label task. For tokens the column of tags, or of spans."""
    label_names: Names | None = Field(default=None, min_length=1)
    """Label names in the order of the model's outputs. For tokens the types of entities, which are sorted. Default:
    those of the data, sorted; other files then name labels, for 0 and 1 would say nothing."""
    metric: Metric | None = None
    """What scores the task, and selects epochs, arms, trials and exports: a name such as `macro_f1`, that of a label
    such as `recall@0.9:spam` (at precision 0.9), or `cost: {label: {decision: cost}}`. null: by kind and classes."""

    @model_validator(mode="after")
    def _glue_is_complete(self) -> Self:
        given = [key for key in ("text", "label", "label_names", "metric") if getattr(self, key) is not None]
        if self.name is not None and (given or self.kind != "auto"):
            keys = ", ".join(f"task.{key}" for key in given or ["kind"])
            raise ValueError(
                f"{self.name!r} is a GLUE task with known columns and metric; leave out {keys}, or task.name"
            )
        if len(set(self.label_names or ())) != len(self.label_names or ()):
            raise ValueError("task.label_names holds a name twice")
        return self


class TrainConfig(Section):
    """How one model is trained (AdamW)."""

    epochs: float | None = Field(default=3.0, gt=0.0)
    """Passes over the training rows. null: chosen by their number, so that few rows give enough steps."""
    batch_size: int = Field(default=32, ge=1, le=MOST)
    """Rows per optimiser step. The loss is their exact mean, or that of their words, whatever the micro-batches."""
    learning_rate: float | None = Field(default=2e-5, gt=0.0)
    """Peak learning rate. null: chosen by the width of the model."""
    head_learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the head and other fresh modules. null: the same as `learning_rate`."""
    weight_decay: float = Field(default=0.01, ge=0.0)
    """Weight decay of AdamW."""
    warmup_fraction: float = Field(default=0.06, ge=0.0, lt=1.0)
    """Share of the steps over which the learning rate rises from 0."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate changes after the warm-up."""
    max_grad_norm: float = Field(default=1.0, gt=0.0)
    """Larger gradients are scaled down to this norm."""
    dropout: float | None = Field(default=None, ge=0.0, lt=1.0)
    """Dropout of the model during training. null: as its config says. `lora.dropout` is separate."""
    max_length: int | None = Field(default=None, ge=4, le=MOST)
    """Longest input in tokens. Longer texts are cut and counted; with `data.long_texts: windows`, and in a task of
    tokens, they are read in overlapping windows of this length. null: long enough for 99% of the training texts."""
    micro_batch_tokens: int | None = Field(default=16384, ge=16, le=MOST)
    """Largest number of padded tokens in one forward and backward pass. It limits memory; the loss stays the same, but
    for the draws of a dropout. On a CPU at most 2,048, which is faster."""
    gradient_checkpointing: bool = False
    """Compute activations again rather than store them: same results, less memory, one more forward pass."""
    select: Literal["auto", "last", "best"] = "last"
    """Which epoch's weights are kept: the last, or the best on validation. `auto`: the best of a task of tokens, else
    the last; then at most five epochs are validated."""
    class_weights: OpenClassWeights | None = None
    """Factors of the hard loss by label: `{spam: 5}`, others 1, or `balanced`, inverse to a class's rows, with mean 1
    over all; for multi-label, of rows that have the label. `auto`: `balanced` where the task's metric is `macro_f1` or
    `balanced_accuracy` of one label a text, in a teacher of more than two, else none. The soft loss has none."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Stop after this many epochs without a better validation score. Needs `select: best`."""

    def selection(self, kind: Kind) -> Literal["last", "best"]:
        """Say which epoch's weights are kept in a task of this kind."""
        if self.select != "auto":
            return self.select
        return "best" if kind == "tokens" else "last"

    def scored_every(self, kind: Kind) -> int:
        """Count the epochs from one validation to the next: with few rows they are many, and the last one counts."""
        return 1 if self.selection(kind) == "best" else math.ceil((self.epochs or 1) / 5)

    @model_validator(mode="after")
    def _patience_keeps_the_best(self) -> Self:
        if self.early_stopping_patience is not None and self.select != "best":
            raise ValueError("early_stopping_patience needs select: best, or the weights kept are the worst seen")
        return self


class TeacherTrainConfig(TrainConfig):
    """How the teacher is fine-tuned."""


class StudentTrainConfig(TrainConfig):
    """How the student arms and the arm `lora` are trained."""

    epochs: float | None = Field(default=5.0, gt=0.0)
    """Passes over the training rows. null: chosen by their number, so that few rows give enough steps."""
    learning_rate: float | None = Field(default=5e-4, gt=0.0)
    """Peak learning rate of the arms with adapters. null: chosen by the width of the model."""


class SettledTraining(TrainConfig):
    """How one model is trained, with nothing left open."""

    epochs: float
    learning_rate: float
    max_length: int


class TeacherConfig(Section):
    """The large model, or a table of its outputs."""

    model: str | None = None
    """Pretrained encoder or decoder (Llama, Qwen, GPT-2 ...) to fine-tune: a Hub id or a folder."""
    revision: str | None = None
    """Commit, tag or branch of `model` or `fine_tuned`."""
    fine_tuned: str | None = None
    """A teacher that is already fine-tuned on the task: a Hub id or a folder. It is scored, not trained."""
    label_names: Names | None = None
    """Label order of `fine_tuned`, if its own config only says LABEL_0, LABEL_1 ..."""
    logits: str | None = None
    """A table of logits: CSV, JSON Lines or Parquet with `id`, optional `split`, one column per label name."""
    probabilities: str | None = None
    """The same with probabilities in place of logits; or with one column `label` of label names, smoothed by 0.1."""
    seed: int | None = Field(default=None, ge=0, lt=SEEDS)
    """Seed of the one teacher. Default: the first of `run.seeds`."""
    tuning: Literal["full", "lora"] = "full"
    """How the teacher is fine-tuned: all weights (arm `fft`), or adapters as in `lora` (arm `lora`), which are merged
    before it labels. Its rate is then `adapter_learning_rate`; all else is as in `train`."""
    adapter_learning_rate: float | None = Field(default=None, gt=0.0)
    """Peak learning rate of the arm `lora`. null: that of the student, or chosen by the teacher's width."""
    train: TeacherTrainConfig = TeacherTrainConfig()
    trust_remote_code: bool = False
    """Let the model's own Python code run. Read that code first."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("fine_tuned", "logits", "probabilities") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"one teacher only, but {' and '.join('teacher.' + key for key in given)} are set")
        if self.label_names is not None and self.fine_tuned is None:
            raise ValueError("teacher.label_names orders the labels of teacher.fine_tuned, which is not set")
        if given and self.tuning != "full":
            raise ValueError(f"teacher.tuning is how a teacher is trained here, but teacher.{given[0]} gives one")
        return self

    @property
    def is_table(self) -> bool:
        """Whether stored outputs teach, so that no teacher model is loaded."""
        return self.logits is not None or self.probabilities is not None


class StudentConfig(Section):
    """The small model."""

    model: str | None = None
    """Pretrained encoder: a Hub id or a folder."""
    revision: str | None = None
    """Commit, tag or branch of `model`."""
    from_teacher_layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """In place of `model`: the pretrained teacher's embeddings and these of its layers, from 0 (arXiv 2305.15032)."""
    full_learning_rate: float | None = Field(default=5e-5, gt=0.0)
    """Peak learning rate of `student-fft` and `kd-fft`. null: chosen by the width of the student. Their head has the
    teacher's `head_learning_rate`; everything else is as in `train`."""
    train: StudentTrainConfig = StudentTrainConfig()
    trust_remote_code: bool = False
    """Let its tokenizer's own Python code run. Read that code first. A model that is such code can only teach."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.model is not None and self.from_teacher_layers is not None:
            raise ValueError("one student only, but student.model and student.from_teacher_layers are both set")
        return self


class LoraSettings(Section):
    """The adapters (LoRA, through PEFT)."""

    rank: int = Field(default=8, ge=1, le=8192)
    """Rank of each adapter."""
    alpha: float = Field(default=16.0, gt=0.0)
    """The adapter's output is multiplied by alpha / rank (by alpha / sqrt(rank) with `rslora`)."""
    dropout: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Dropout before the adapter."""
    targets: Literal["query-value", "all-linear"] | Names = "query-value"
    """Layers with adapters: the paper's two, every linear layer (QLoRA, arXiv 2305.14314), or the named ones."""
    embedding_rank: int = Field(default=0, ge=0, le=8192)
    """Rank of an adapter on the word embeddings. 0: none."""
    embedding_alpha: float = Field(default=2.0, gt=0.0)
    """Scale of that adapter. It should be smaller than `alpha`, since PEFT starts it with N(0, 1)."""
    rslora: bool = False
    """Rank-stabilised LoRA (arXiv 2312.03732)."""
    dora: bool = False
    """Weight-decomposed adapters (DoRA, arXiv 2402.09353)."""
    init: Literal["default", "gaussian", "orthogonal"] = "default"
    """Initialisation of the adapters."""


class DistilConfig(Section):
    """The loss of the distilled arms: alpha * (loss against the labels) + (1 - alpha) * (loss against the teacher)."""

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    """Weight of the labels, as in the paper. The teacher has 1 - alpha."""
    temperature: float = Field(default=2.0, gt=0.0, le=1000.0)
    """How much both distributions are softened with `loss: kl` (Hinton et al., arXiv 1503.02531)."""
    loss: Literal["kl", "mse"] = "kl"
    """Loss against the teacher: KL divergence times temperature squared, or mean squared error of the logits. A
    regression always has the latter."""


class RunConfig(Section):
    """What is run, and on what."""

    arms: tuple[Arm, ...] = Field(default=("words", "fft", "kd-lora", "student-lora"), min_length=1)
    """Arms to run: `words` (bag of words; left out for tokens), `fft` (the teacher), `kd-lora` (the distilled
    student), `kd-fft` (the same with all weights tuned), `student-lora` (the control), `lora`, `student-fft`."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=SEEDS)], ...] = Field(default=(0, 1, 2), min_length=1)
    """Every arm runs once per seed, except `words`, which has no random choice and runs once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format in training. `auto` chooses by what the machine can do, and records it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. `auto`: CUDA if PyTorch sees a device, else the CPU. Apple's `mps` is not used."""
    devices: Literal["auto", "one"] = "auto"
    """Of several GPUs, `auto` gives each run of an experiment or suite one, so that runs go on at the same time; `one`
    uses the first."""
    threads: int | None = Field(default=None, ge=1, le=1024)
    """CPU threads. Default: PyTorch's choice (the physical cores), and no more than a container's CPU limit."""
    fail_fast: bool = False
    """Stop at the first failed run. Otherwise the other arms go on."""
    checkpoint_seconds: float = Field(default=60.0, gt=0.0)
    """Least seconds between two checkpoints. Where writing one takes more than a second, they are 20 times what is
    above it apart, up to 10 minutes. A crash costs no more, besides the step or evaluation that it hits."""
    keep_checkpoints: int = Field(default=1, ge=1, le=MOST)
    """Number of checkpoints that a training keeps. A second one helps if the newest is damaged."""
    report_to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], _LISTED] = ()
    """Trackers that get every run: `tensorboard`, `wandb` (offline), `mlflow`."""

    @model_validator(mode="before")
    @classmethod
    def _without_sharding(cls, values: Any) -> Any:
        """Read the folders of version 0.1, which all say that no teacher is shared out over processes."""
        gone = isinstance(values, Mapping) and values.get("shard_teacher") is False
        return {key: value for key, value in values.items() if key != "shard_teacher"} if gone else values

    @model_validator(mode="after")
    def _nothing_twice(self) -> Self:
        for key, values in {"arms": self.arms, "seeds": self.seeds, "report_to": self.report_to}.items():
            if len(set(values)) != len(values):
                raise ValueError(f"run.{key} holds a value twice: {list(values)}")
        return self


class ReportConfig(Section):
    """Additional parts of the report."""

    paper: bool = False
    """Compare the claims of the KD-LoRA paper with its own tables and with this experiment."""


class Config(Section):
    """One experiment: arms and seeds on one task."""

    name: str | None = Field(default=None, pattern=r"^\w[\w .+-]*$", max_length=100)
    """Name of the experiment. Default: the name of the task or the training file. Results go to `runs/<name>`."""
    recipe: RecipeName = "default"
    """A named set of defaults for the other keys. Keys that you set win. docs/recipes.md has figures."""
    family: FamilyName | None = None
    """The paper's teacher and student of this family, unless `teacher.model` or `student.model` is set."""
    task: TaskConfig = TaskConfig()
    data: DataConfig
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    lora: LoraSettings = LoraSettings()
    distil: DistilConfig = DistilConfig()
    run: RunConfig = RunConfig()
    export: ExportConfig = ExportConfig()
    defer: DeferConfig = DeferConfig()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Lay the recipe under what was set, in sections that were made in Python too."""
        return fill_in(_ANY.dump_python(values, exclude_unset=True)) if isinstance(values, Mapping) else values

    @model_validator(mode="after")
    def _arms_have_their_models(self) -> Self:
        if faults := "; ".join(self._missing_models()):
            raise ValueError(faults)
        return self

    def _missing_models(self) -> Iterable[str]:
        arms, teacher, student = set(self.run.arms), self.teacher, self.student
        taught = teacher.model is not None or teacher.fine_tuned is not None or teacher.is_table
        needing = sorted(arms & (TEACHER_ARMS | DISTILLED_ARMS))
        if needing and not taught:
            yield f"the arms {needing} need a teacher: set family, or teacher.model, .fine_tuned or .logits"
        if "lora" in arms and taught and teacher.model is None:
            yield "the arm 'lora' adapts the pretrained teacher: set teacher.model too, or drop the arm from run.arms"
        if arms - TEACHER_ARMS - {"words"} and student.model is None and student.from_teacher_layers is None:
            yield "no student: set student.model, student.from_teacher_layers or family"
        if student.from_teacher_layers is not None and teacher.model is None:
            yield "student.from_teacher_layers copies layers of the pretrained teacher: set teacher.model"
        if teacher.probabilities is not None and self.distil.loss == "mse":
            yield "teacher.probabilities gives no logits for distil.loss: mse; set distil.loss to kl, or teacher.logits"
        if self.data.augment != 0 and teacher.is_table:
            yield "data.augment makes new texts, and a table has no answers for them: set it to 0, or a teacher model"
        stride = self.data.window_stride
        for key, longest in (("teacher", teacher.train.max_length), ("student", student.train.max_length)):
            if stride is not None and longest is not None and stride >= longest:
                yield f"data.window_stride: {stride} is not below {key}.train.max_length ({longest}), a window's length"

    @property
    def given_teacher(self) -> bool:
        """Whether the teacher is not trained here: a fine-tuned model, or a table of outputs."""
        return self.teacher.fine_tuned is not None or self.teacher.is_table

    @property
    def teacher_arm(self) -> Arm:
        """The arm whose run with `teacher_seed` teaches."""
        return "lora" if self.teacher.tuning == "lora" else "fft"

    @property
    def teacher_seed(self) -> int:
        """Seed of the one teacher that teaches every student."""
        return self.run.seeds[0] if self.teacher.seed is None or self.given_teacher else self.teacher.seed

    def title(self) -> str:
        """Name the experiment: `name`, else the GLUE task, else the data's own name, safe as a folder's."""
        source = self.data.train if self.data.path is None else self.data.path
        stem = re.sub(r"[^\w.+-]", "-", Path(str(source)).stem).strip(".-")
        return self.name or self.task.name or stem or "experiment"

    def fingerprint(self) -> str:
        """Hash all but the name: SHA-256 of the canonical JSON, hexadecimal."""
        values = self.model_dump(mode="json", exclude={"name"})
        return hashlib.sha256(json.dumps(without_later_keys(values), sort_keys=True).encode()).hexdigest()
