"""Load splits, or gather why they are refused; twenty texts and their labels."""

from pathlib import Path

import pytest
from datasets import Dataset

from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import Splits, load_splits
from kdlora.data.spool import read_column
from kdlora.errors import DataError

TEXTS = [f"text {row}" for row in range(20)]
WORDS = ["bad", "good"] * 10


def load(task: dict | None = None, **data) -> Splits:
    data = {name: str(value) if isinstance(value, Path) else value for name, value in data.items()}
    return load_splits(TaskConfig(**(task or {})), DataConfig(**data))


def refused(task: dict | None = None, **data) -> str:
    with pytest.raises(DataError) as caught:
        load(task, **data)
    return str(caught.value)


def values(dataset: Dataset, name: str) -> list:
    return read_column(dataset, name).to_pylist()


def labels(dataset: Dataset) -> list:
    return values(dataset, "label")


def words_of(row: dict) -> list[str]:
    return [row["text"][start:end] for start, end in zip(row["starts"], row["ends"], strict=True)]
