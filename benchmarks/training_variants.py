"""The ways of training that `training.py` compares, each run by a process of its own for a bounded time.

    python benchmarks/training_variants.py '{"variant": "ours", "task": "cola", ...}'

prints one JSON line: rows trained on, seconds of the training loop (data included, evaluation excluded), and the peak
of the process's memory above the level after imports.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kdlora.config import DataConfig, DistilConfig, LoraConfig, StudentTrainConfig, TaskConfig, TeacherTrainConfig
from kdlora.data.batches import tokenise
from kdlora.data.load import Splits, load_splits
from kdlora.defaults import RECIPES
from kdlora.distil.inference import predict_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_precision
from kdlora.distil.session import TrainingOptions
from kdlora.distil.train import train_model
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import load_encoder
from kdlora.system.environment import forget_peak, read_memory

BATCH = 32
LEARNING_RATE = 5e-4
LONG_ROWS = 2000
BARE: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "num_train_epochs": 50,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Trainer's arguments of every stock variant: nothing but training."""


@dataclass(frozen=True)
class Work:
    """One measurement.

    Attributes:
        variant: a key of `VARIANTS`.
        task: `cola`, `mrpc`, `long` (200 to 400 tokens) or `wide` (every row has 128 tokens).
        teacher: folder of the large encoder.
        student: folder of the small one.
        glue: folder in GLUE's layout.
        seconds: of training, at most; the last step is finished.
    """

    variant: str
    task: str
    teacher: str
    student: str
    glue: str
    seconds: float

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return 512 if self.task == "long" else 128


class Budget(TrainerCallback):
    """Stops a training when its time is up, and times the loop."""

    def __init__(self, seconds: float) -> None:
        """Allow so many seconds."""
        self.seconds = seconds
        self.start = self.end = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at it."""
        self.end = time.perf_counter()
        control.should_training_stop = self.end - self.start >= self.seconds


def load_rows(work: Work) -> Splits:
    """Load the data; validation is cut to a few rows, for it is not what is measured."""
    name = work.task if work.task in ("cola", "mrpc") else "sst2"
    splits = load_splits(TaskConfig(name=name), DataConfig(path=work.glue, max_train_examples=20_000))
    splits = replace(splits, validation=splits.validation.select(range(16)))
    if name == work.task:
        return splits
    return replace(splits, train=_joined(splits.train, (200, 400) if work.task == "long" else (160, 170)))


def _joined(rows: Dataset, words: tuple[int, int]) -> Dataset:
    """Join neighbouring sentences into texts of so many words at least; a word is a token and a bit."""
    draw = np.random.default_rng(0)
    texts, labels, ids, at = [], [], [], 0
    sentences, classes = list(rows["text"]), list(rows["label"])
    for number in range(LONG_ROWS):
        wanted, found = int(draw.integers(*words) * 0.85), []
        while len(found) < wanted:
            found += sentences[at % len(sentences)].split()
            at += 1
        texts.append(" ".join(found[:wanted]))
        labels.append(classes[at % len(classes)])
        ids.append(str(number))
    return Dataset.from_dict({"id": ids, "text": texts, "label": labels}).cast(rows.features)


def invented_logits(splits: Splits) -> TeacherLogits:
    """Give every training row some teacher logits: the work is the same whatever they say."""
    values = np.random.default_rng(0).normal(size=(len(splits.train), splits.task.num_labels))
    ids = pa.chunked_array([pa.array(list(splits.train["id"]))])
    return TeacherLogits(ids, values.astype(np.float32), splits.task.label_names, "invented", {}, 0)


def ours(
    work: Work, callbacks: Sequence[TrainerCallback] = (), recipe: Literal["paper", "default"] = "paper"
) -> tuple[int, float]:
    """Train the student with adapters on stored logits; the recipe says which adapters, loss and dropout."""
    keys = RECIPES[recipe]
    lora, distil = LoraConfig(**keys.get("lora", {})), DistilConfig(**{"loss": "mse"} | keys.get("distil", {}))
    dropout = keys.get("student", {}).get("train", {}).get("dropout")
    return _train_ours(work, work.student, lora=lora, distil=distil, dropout=dropout, callbacks=callbacks)


def ours_lora_on_teacher(work: Work) -> tuple[int, float]:
    """Train adapters of the large encoder, without a teacher."""
    return _train_ours(work, work.teacher, lora=LoraConfig(), distil=None)


def ours_teacher(work: Work) -> tuple[int, float]:
    """Fine-tune the large encoder."""
    return _train_ours(work, work.teacher, lora=None, distil=None)


def _train_ours(
    work: Work,
    source: str,
    *,
    lora: LoraConfig | None,
    distil: DistilConfig | None,
    dropout: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[int, float]:
    splits = load_rows(work)
    encoder = load_encoder(source, splits.task, seed=0)
    model = encoder.model if lora is None else add_adapter(encoder, lora, seed=0)
    rows = splits.train if distil is None else invented_logits(splits).attach(splits.train)
    settings = (StudentTrainConfig if lora else TeacherTrainConfig)(epochs=50, batch_size=BATCH, dropout=dropout)
    with tempfile.TemporaryDirectory() as folder:
        outcome = train_model(
            model,
            encoder.tokenizer,
            tokenise(rows, encoder.tokenizer, work.max_length),
            tokenise(splits.validation, encoder.tokenizer, work.max_length),
            splits.task,
            settings,
            TrainingOptions(Path(folder), distil=distil, callbacks=[Budget(work.seconds), *callbacks]),
        )
    return outcome.examples, outcome.train_seconds


def ours_labelling(work: Work) -> tuple[int, float]:
    """Let the large encoder label rows, as `teacher_logits` does."""
    splits = load_rows(work)
    encoder = load_encoder(work.teacher, splits.task, seed=0)
    count = len(splits.train) if work.task != "long" else 500
    rows = splits.train.select(range(min(count, len(splits.train))))
    start = time.perf_counter()
    tokens = tokenise(rows, encoder.tokenizer, work.max_length)
    precision, _ = resolve_precision("auto", "cpu")
    predict_logits(encoder.model, encoder.tokenizer, tokens, precision=precision, batch_tokens=16384)
    return len(rows), time.perf_counter() - start


def stock(work: Work) -> tuple[int, float]:
    """Transformers' Trainer with PEFT as most people run it: fp32, dynamic padding, no teacher."""
    return _train_stock(work, work.student)


def stock_bf16(work: Work) -> tuple[int, float]:
    """The same with `bf16=True`."""
    return _train_stock(work, work.student, bf16=True)


def stock_padded(work: Work) -> tuple[int, float]:
    """The same, every text padded to 512 tokens, as the paper's script does."""
    return _train_stock(work, work.student, pad_to=512)


def stock_teacher(work: Work) -> tuple[int, float]:
    """Full fine-tuning of the large encoder with the stock Trainer, fp32."""
    return _train_stock(work, work.teacher, lora=False)


def stock_online(work: Work) -> tuple[int, float]:
    """The stock Trainer with a teacher called in `compute_loss`; it reads its own token ids."""
    return _train_stock(work, work.student, online=True)


def txtai_online(work: Work) -> tuple[int, float]:
    """HFTrainer of txtai with LoRA and a teacher, fp32; it gives the teacher the student's token ids."""
    from txtai.pipeline.train import hftrainer

    budget = Budget(work.seconds)
    trainers: list[Trainer] = []

    class Timed(hftrainer.DistillationTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, callbacks=[budget], **kwargs)
            trainers.append(self)

    hftrainer.DistillationTrainer = Timed  # HFTrainer takes no callbacks, and nothing else bounds its time
    splits = load_rows(work)
    texts = ("text", "text_pair") if "text_pair" in splits.train.column_names else ("text", None)
    hftrainer.HFTrainer()(
        work.student,
        splits.train,
        columns=(*texts, "label"),
        maxlength=work.max_length,
        lora={
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.05,
            "target_modules": ["query", "value"],
            "modules_to_save": ["classifier"],
        },
        teacher=work.teacher,
        distillation=(2.0, 0.5),
        learning_rate=LEARNING_RATE,
        **BARE,
    )
    return trainers[0].state.global_step * BATCH, budget.end - budget.start


class OnlineTrainer(Trainer):
    """Distils from a teacher that runs in every step, as tutorials do."""

    teacher: torch.nn.Module

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        """Hard and soft loss, half each, T = 2."""
        seen = {name.removeprefix("teacher_"): inputs.pop(name) for name in list(inputs) if name.startswith("teacher_")}
        with torch.no_grad():
            wanted = torch.log_softmax(self.teacher(**seen).logits / 2, -1)
        outputs = model(**inputs)
        found = torch.log_softmax(outputs.logits / 2, -1)
        soft = torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean") * 4
        loss = 0.5 * outputs.loss + 0.5 * soft
        return (loss, outputs) if return_outputs else loss


class TwoTokenizersCollator:
    """Pads the student's and the teacher's token ids of a batch."""

    def __init__(self, student: Any, teacher: Any) -> None:
        """Take both tokenizers."""
        self.student, self.teacher = DataCollatorWithPadding(student), DataCollatorWithPadding(teacher)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad."""
        own = [{name: value for name, value in row.items() if not name.startswith("teacher_")} for row in rows]
        other = [{name[8:]: value for name, value in row.items() if name.startswith("teacher_")} for row in rows]
        padded = self.teacher(other)
        return {**self.student(own), **{f"teacher_{name}": value for name, value in padded.items()}}


def _train_stock(
    work: Work, source: str, *, bf16: bool = False, pad_to: int | None = None, lora: bool = True, online: bool = False
) -> tuple[int, float]:
    splits = load_rows(work)
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2)
    if lora:
        targets = ["q", "v"] if model.config.model_type == "mpnet" else ["query", "value"]
        model = get_peft_model(
            model, PeftLoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
        )
    collator: Any = DataCollatorWithPadding(tokenizer)
    if pad_to is not None:
        collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=pad_to)
    rows = _stock_rows(splits, tokenizer, work.max_length)
    budget = Budget(work.seconds)
    trainer = (OnlineTrainer if online else Trainer)(
        model,
        TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            learning_rate=LEARNING_RATE if lora else 2e-5,
            bf16=bf16,
            remove_unused_columns=not online,
            **BARE,
        ),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[budget],
    )
    if online:
        other = AutoTokenizer.from_pretrained(work.teacher)
        trainer.teacher = AutoModelForSequenceClassification.from_pretrained(work.teacher, num_labels=2).eval()
        seen = _stock_rows(splits, other, work.max_length).remove_columns("labels")
        for name in seen.column_names:
            rows = rows.add_column(f"teacher_{name}", seen[name][:])
        trainer.train_dataset, trainer.data_collator = rows, TwoTokenizersCollator(tokenizer, other)
    trainer.train()
    return trainer.state.global_step * BATCH, budget.end - budget.start


def _stock_rows(splits: Splits, tokenizer: Any, max_length: int) -> Dataset:
    pair = "text_pair" in splits.train.column_names

    def encode(rows: dict[str, Any]) -> Any:
        texts = (rows["text"], rows["text_pair"]) if pair else (rows["text"],)
        return tokenizer(*texts, truncation=True, max_length=max_length)

    kept = splits.train.rename_column("label", "labels")
    return kept.map(encode, batched=True, remove_columns=[name for name in kept.column_names if name != "labels"])


VARIANTS = {
    "ours": ours,
    "ours: default recipe": partial(ours, recipe="default"),
    "ours: LoRA on the teacher": ours_lora_on_teacher,
    "ours: teacher": ours_teacher,
    "ours: labelling": ours_labelling,
    "stock": stock,
    "stock bf16": stock_bf16,
    "stock, online teacher": stock_online,
    "stock, padded to 512": stock_padded,
    "txtai, online teacher": txtai_online,
    "stock: teacher": stock_teacher,
}


def measure(work: Work) -> dict[str, Any]:
    """Run one variant in this process."""
    forget_peak()
    level = read_memory()
    rows, seconds = VARIANTS[work.variant](work)
    peak = read_memory()
    rise = peak.high_water - level.resident if peak and level else None
    return {"rows": rows, "seconds": seconds, "rows_per_second": rows / seconds, "peak_memory_bytes": rise}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    print(json.dumps(measure(Work(**json.loads(sys.argv[1])))))
