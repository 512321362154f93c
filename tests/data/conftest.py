"""Small helpers of the data room's tests."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from tiny import write_csv


@pytest.fixture
def csv_file(tmp_path: Path) -> Callable[..., str]:
    """`csv_file(name, text=[...], label=[...])` writes a CSV file and gives its path."""

    def write(name: str, **columns: Sequence[object]) -> str:
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return str(write_csv(tmp_path / name, rows))

    return write


@pytest.fixture
def emotions() -> Dataset:
    """Twenty rows, `text 0` ..., with the classes sad and glad by turns."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["sad", "glad"]), "n": Value("int32")})
    return Dataset.from_dict(
        {"text": [f"text {row}" for row in range(20)], "label": [0, 1] * 10, "n": range(20)}, features
    )
