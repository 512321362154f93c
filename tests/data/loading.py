"""Load splits, or gather why they are refused; twenty texts and their labels."""

import pytest
from datasets import Dataset

from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import Splits, load_splits
from kdlora.data.spool import read_column
from kdlora.errors import DataError

TEXTS = [f"text {row}" for row in range(20)]
WORDS = ["bad", "good"] * 10


def load(task: dict | None = None, **data) -> Splits:
    return load_splits(TaskConfig(**(task or {})), DataConfig(**data))


def refused(task: dict | None = None, **data) -> str:
    with pytest.raises(DataError) as caught:
        load(task, **data)
    return str(caught.value)


def values(dataset: Dataset, name: str) -> list:
    return read_column(dataset, name).to_pylist()


def labels(dataset: Dataset) -> list:
    return values(dataset, "label")
