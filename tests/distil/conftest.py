"""Small trainings for the tests of this room."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from kdlora.config import DistilConfig, LoraSettings, TrainConfig
from kdlora.data.batches import Tokenised, tokenise
from kdlora.data.spool import label_array
from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.data.word_tokens import word_offsets
from kdlora.distil.logits import TeacherLogits, join_unlabelled
from kdlora.distil.train import train_model
from kdlora.distil.trainer import TrainingOptions, TrainOutcome
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder
from sentences import tagged_rows
from tiny import sentiment_rows

TASKS = {
    "single-label": Task("single-label", ("text",), ("label",), ("negative", "positive"), ("accuracy",)),
    "multi-label": Task("multi-label", ("text",), ("a", "b", "c"), ("a", "b", "c"), ("micro_f1",)),
    "regression": Task("regression", ("text",), ("rating",), ("rating",), ("pearson", "spearman")),
    "tokens": Task("tokens", ("words",), ("tags",), tag_names(("BAD", "GOOD", "PLACE")), ("entity_f1",)),
}


def examples(kind: str, count: int, seed: int = 0) -> Dataset:
    """Make rows that a tiny model can learn, with texts of very different lengths."""
    draw = np.random.default_rng(seed)
    if kind == "tokens":
        return _sentences(count, seed, draw)
    rows = sentiment_rows(count, seed)
    positive = np.array([row["label"] == "positive" for row in rows])
    texts = [" ".join([row["text"]] * int(draw.integers(1, 4))) for row in rows]
    label: list[Any]
    if kind == "single-label":
        label = positive.astype(int).tolist()
    elif kind == "multi-label":
        label = [[float(yes), float(not yes), float(draw.integers(2))] for yes in positive]
    else:
        label = (2000.0 + 300.0 * positive + 20.0 * draw.normal(size=count)).astype(np.float32).tolist()
    table = {"id": [f"{seed}-{row}" for row in range(count)], "text": texts, "label": label}
    return Dataset.from_dict(table)


def _sentences(count: int, seed: int, draw: np.random.Generator) -> Dataset:
    """Make rows of words and tags, some of them longer than a window; a word in twenty has no tag."""
    table: dict[str, list[Any]] = {name: [] for name in ("id", "text", "starts", "ends", "label")}
    for row, one in enumerate(tagged_rows(count, seed)):
        often = int(draw.integers(1, 13))
        words, tags = (part * often for part in one.values())
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        names = TASKS["tokens"].label_names
        label = [-100 if draw.random() < 0.05 else names.index(tag) for tag in tags]
        starts = [int(end) - len(word) for end, word in zip(ends, words, strict=True)]
        for name, value in zip(table, (f"{seed}-{row}", " ".join(words), starts, ends.tolist(), label), strict=True):
            table[name].append(value)
    return Dataset.from_dict(table)


def teacher_for(dataset: Dataset, task: Task, seed: int = 0) -> TeacherLogits:
    """Invent a teacher that knows the labels but for some noise."""
    offsets, labels = word_offsets(dataset), label_array(dataset)
    noise = np.random.default_rng(seed).normal(size=(len(labels), task.num_labels))
    if task.kind == "multi-label":
        logits = 4.0 * labels - 2.0 + noise
    elif task.kind == "regression":
        logits = labels[:, None] + 10.0 * noise
    else:
        logits = 2.0 * np.eye(task.num_labels)[np.maximum(labels, 0)] + noise
    if offsets is not None:  # it does not see the first word of all
        logits[0] = np.nan
    values = logits.astype(np.float32)
    return TeacherLogits(pa.array(dataset["id"]), values, task.label_names, "invented", offsets=offsets)


def tokenise_taught(rows: Dataset, task: Task, encoder: Encoder) -> Tokenised:
    """Give rows a teacher, and turn them into token ids."""
    return tokenise(teacher_for(rows, task).attach(rows), encoder.tokenizer, 48)


def set_dropout(model: torch.nn.Module, rate: float) -> None:
    """Set every dropout, of adapters too."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = rate
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = rate


@dataclass
class Setup:
    """One training, small and ready to run; its training rows have a teacher's logits."""

    task: Task
    encoder: Encoder
    model: Any
    train: Tokenised
    validation: Tokenised
    settings: TrainConfig

    def run(self, folder: Path, *, distil: DistilConfig | None = DistilConfig(), **options: Any) -> TrainOutcome:
        """Train, with what a test does not set left at its default."""
        usual = {"seed": 3, "precision": "fp32", "device": "cpu", "checkpoint_seconds": 1e9}
        usual |= {"fresh": self.encoder.fresh, "distil": distil}
        return train_model(
            self.model,
            self.encoder.tokenizer,
            self.train,
            self.validation,
            self.task,
            self.settings,
            TrainingOptions(folder, **usual | options),
        )


@pytest.fixture
def make_setup(tiny_model_folder) -> Callable[..., Setup]:
    """`make_setup(kind=..., lora=True, dropout=None, rows=44, **settings)` gives a fresh training.

    With `unlabelled=30` it has as many rows more, without labels.
    """

    def make(
        kind: str = "single-label",
        *,
        lora: bool = True,
        dropout: float | None = None,
        rows: int = 44,
        unlabelled: int = 0,
        **settings: Any,
    ) -> Setup:
        task = TASKS[kind]
        encoder = load_encoder(str(tiny_model_folder("bert")), task, seed=1)
        model: Any = encoder.model
        if lora:
            model = add_adapter(encoder, LoraSettings(dropout=0.1 if dropout is None else dropout), seed=1)
        if dropout is not None:
            set_dropout(model, dropout)
        train = tokenise_taught(examples(kind, rows), task, encoder)
        if unlabelled:
            more = tokenise_taught(examples(kind, unlabelled, seed=5), task, encoder)
            more = dataclasses.replace(more, dataset=more.dataset.remove_columns("label"))
            train = join_unlabelled(train, more, task)
        values = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "max_length": 48} | settings
        return Setup(
            task=task,
            encoder=encoder,
            model=model,
            train=train,
            validation=tokenise(examples(kind, 30, seed=9), encoder.tokenizer, 48),
            settings=TrainConfig(**values),
        )

    return make


@pytest.fixture
def make_examples() -> Callable[..., Dataset]:
    """`make_examples(kind, count, seed=0)` gives canonical rows."""
    return examples


@pytest.fixture
def tasks() -> dict[str, Task]:
    """A task of each kind."""
    return TASKS


@pytest.fixture
def make_model(tiny_model_folder) -> Callable[..., Any]:
    """`make_model(family="bert", rate=0.0, **lora)` gives a classifier in training, its adapter not zero."""

    def make(family: str = "bert", rate: float = 0.0, **lora: Any) -> Any:
        encoder = load_encoder(str(tiny_model_folder(family)), TASKS["single-label"], seed=1)
        model = add_adapter(encoder, LoraSettings(dropout=rate, **lora), seed=1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        set_dropout(model, rate)
        return model.train()

    return make
