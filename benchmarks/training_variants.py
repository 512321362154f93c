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
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from kdlora.config import DataConfig, DistilConfig, LoraSettings, StudentTrainConfig, TaskConfig, TeacherTrainConfig
from kdlora.data.batches import tokenise
from kdlora.data.load import Splits, load_splits
from kdlora.data.tags import NO_TAG
from kdlora.defaults import RECIPES
from kdlora.distil.inference import predict_logits
from kdlora.distil.precision import resolve_precision
from kdlora.distil.train import train_model
from kdlora.distil.trainer import TrainingOptions
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import load_encoder
from kdlora.system.environment import forget_peak, read_memory

BATCH = 32
LEARNING_RATE = 5e-4
LONG_ROWS = 2000
WNUT = {"train": "train", "validation": "dev"}
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
Speed = tuple[int, float]
"""Rows, and the seconds that they took."""


@dataclass(frozen=True)
class Work:
    """One measurement: a key of `VARIANTS`, and folders of the large encoder, the small one and the data.

    The task is `cola`, `mrpc`, `long` (200 to 400 tokens), `wide` (every row has 128 tokens) or `wnut17` (entities).
    """

    variant: str
    task: str
    teacher: str
    student: str
    data: str
    seconds: float

    @property
    def max_length(self) -> int:
        """Longest input in tokens."""
        return 512 if self.task == "long" else 128


class Budget(TrainerCallback):
    """Stops a training when its time is up, and times the loop."""

    def __init__(self, seconds: float) -> None:
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
    name = "sst2" if work.task in ("long", "wide") else work.task
    if name == "wnut17":
        files = {split: f"{work.data}/ner/wnut17/{file}.conll" for split, file in WNUT.items()}
        splits = load_splits(TaskConfig(), DataConfig(**files))
    else:
        splits = load_splits(TaskConfig(name=name), DataConfig(path=f"{work.data}/glue", max_train_examples=20_000))
    splits = replace(splits, validation=splits.validation.select(range(16)))
    if name == work.task:
        return splits
    return replace(splits, train=_joined(splits.train, (200, 400) if work.task == "long" else (160, 170)))


def _joined(rows: Dataset, words: tuple[int, int]) -> Dataset:
    """Join neighbouring sentences into texts of so many words at least; a word is a token and a bit."""
    draw = np.random.default_rng(0)
    found, at = [], 0
    sentences, classes = list(rows["text"]), list(rows["label"])
    for number in range(LONG_ROWS):
        wanted, text = int(draw.integers(*words) * 0.85), []
        while len(text) < wanted:
            text += sentences[at % len(sentences)].split()
            at += 1
        found.append({"id": str(number), "text": " ".join(text[:wanted]), "label": classes[at % len(classes)]})
    return Dataset.from_list(found).cast(rows.features)


def with_logits(rows: Dataset, labels: int) -> Dataset:
    """Give every row, or every word, some teacher logits: the work is the same whatever they say."""
    draw = np.random.default_rng(0)
    words = [len(row) for row in rows["starts"]] if "starts" in rows.column_names else [1] * len(rows)
    return rows.add_column("teacher_logits", [draw.normal(size=labels * count).astype(np.float32) for count in words])


def ours(work: Work, source: str = "student", recipe: str = "", *, lora: bool = True) -> Speed:
    """Train as kdlora does; a recipe says which adapters, loss and dropout of a student that stored logits teach."""
    splits, keys = load_rows(work), dict(RECIPES).get(recipe, {})  # type: ignore[call-overload]
    encoder = load_encoder(getattr(work, source), splits.task, seed=0)
    train, distil = splits.train, None
    if recipe:
        train = with_logits(train, splits.task.num_labels)
        distil = DistilConfig(**keys.get("distil", {}))
    settings = (StudentTrainConfig if lora else TeacherTrainConfig)(
        epochs=50, batch_size=BATCH, dropout=keys.get("student", {}).get("train", {}).get("dropout")
    )
    rows = [tokenise(part, encoder.tokenizer, work.max_length) for part in (train, splits.validation)]
    model = add_adapter(encoder, LoraSettings(**keys.get("lora", {})), seed=0) if lora else encoder.model
    with tempfile.TemporaryDirectory() as folder:
        chosen = TrainingOptions(Path(folder), distil=distil, callbacks=[Budget(work.seconds)])
        outcome = train_model(model, encoder.tokenizer, *rows, splits.task, settings, chosen)
    return outcome.examples, outcome.train_seconds


def ours_labelling(work: Work) -> Speed:
    """Let the large encoder label rows, as `teacher_logits` does."""
    splits = load_rows(work)
    encoder = load_encoder(work.teacher, splits.task, seed=0)
    rows = splits.train.select(range(min(500 if work.task == "long" else 20_000, len(splits.train))))
    start = time.perf_counter()
    tokens = tokenise(rows, encoder.tokenizer, work.max_length)
    precision, _ = resolve_precision("auto", "cpu")
    predict_logits(encoder.model, encoder.tokenizer, tokens, precision=precision, batch_tokens=16384)
    return len(rows), time.perf_counter() - start


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


def two_tokenizers_collator(student: Any, teacher: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Pad the student's and the teacher's token ids of a batch."""
    pads = {"": DataCollatorWithPadding(student), "teacher_": DataCollatorWithPadding(teacher)}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        own = [{name: value for name, value in row.items() if not name.startswith("teacher_")} for row in rows]
        other = [{name[8:]: value for name, value in row.items() if name.startswith("teacher_")} for row in rows]
        padded = {prefix: pad(part) for (prefix, pad), part in zip(pads.items(), (own, other), strict=True)}
        return {prefix + name: value for prefix, part in padded.items() for name, value in part.items()}

    return collate


def stock(
    work: Work,
    source: str = "student",
    *,
    bf16: bool = False,
    lora: bool = True,
    online: bool = False,
    pad: bool = False,
) -> Speed:
    """Train with transformers' Trainer and PEFT as most people do: fp32, dynamic padding, no teacher."""
    splits = load_rows(work)
    tokenizer = AutoTokenizer.from_pretrained(getattr(work, source))
    tags = splits.task.kind == "tokens"
    loader = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    model = loader.from_pretrained(getattr(work, source), num_labels=splits.task.num_labels)
    if lora:
        targets = ["q", "v"] if model.config.model_type == "mpnet" else ["query", "value"]
        task_type = "TOKEN_CLS" if tags else "SEQ_CLS"
        adapters = PeftLoraConfig(task_type=task_type, r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets)
        model = get_peft_model(model, adapters)
    padding = {"padding": "max_length", "max_length": 512} if pad else {}  # as the paper's script does
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
        train_dataset=(_stock_words if tags else _stock_rows)(splits, tokenizer, work.max_length),
        data_collator=(DataCollatorForTokenClassification if tags else DataCollatorWithPadding)(tokenizer, **padding),
        callbacks=[budget],
    )
    if online:
        other = AutoTokenizer.from_pretrained(work.teacher)
        trainer.teacher = AutoModelForSequenceClassification.from_pretrained(work.teacher, num_labels=2).eval()
        seen = _stock_rows(splits, other, work.max_length).remove_columns("labels")
        for name in seen.column_names:
            trainer.train_dataset = trainer.train_dataset.add_column(f"teacher_{name}", seen[name][:])
        trainer.data_collator = two_tokenizers_collator(tokenizer, other)
    trainer.train()
    return trainer.state.global_step * BATCH, budget.end - budget.start


def _stock_rows(splits: Splits, tokenizer: Any, max_length: int) -> Dataset:
    texts = [name for name in ("text", "text_pair") if name in splits.train.column_names]
    kept = splits.train.rename_column("label", "labels")
    return kept.map(
        lambda rows: tokenizer(*(rows[name] for name in texts), truncation=True, max_length=max_length),
        batched=True,
        remove_columns=[name for name in kept.column_names if name != "labels"],
    )


def _stock_words(splits: Splits, tokenizer: Any, max_length: int) -> Dataset:
    """Label the first sub-token of each word, as transformers' script for token classification does."""

    def encode(rows: dict[str, list[Any]]) -> Any:
        places = zip(rows["text"], rows["starts"], rows["ends"], strict=True)
        words = [[text[a:b] for a, b in zip(starts, ends, strict=True)] for text, starts, ends in places]
        encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
        encoded["labels"] = [
            [
                NO_TAG if word in (None, before) else tags[word]
                for before, word in pairwise([None, *encoded.word_ids(row)])
            ]
            for row, tags in enumerate(rows["label"])
        ]
        return encoded

    return splits.train.map(encode, batched=True, remove_columns=splits.train.column_names)


VARIANTS: dict[str, Callable[[Work], Speed]] = {
    "ours": partial(ours, recipe="paper"),
    "ours: default recipe": partial(ours, recipe="default"),
    "ours: LoRA on the teacher": partial(ours, source="teacher"),
    "ours: teacher": partial(ours, source="teacher", lora=False),
    "ours: labelling": ours_labelling,
    "stock": stock,
    "stock bf16": partial(stock, bf16=True),
    "stock, online teacher": partial(stock, online=True),
    "stock, padded to 512": partial(stock, pad=True),
    "stock: teacher": partial(stock, source="teacher", lora=False),
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
