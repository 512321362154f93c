"""Small helpers of the data room's tests."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, Features, Value


@pytest.fixture
def csv_file(tmp_path: Path) -> Callable[..., str]:
    """`csv_file(name, text=[...], label=[...])` writes a CSV file and gives its path."""

    def write(name: str, **columns: Sequence[object]) -> str:
        path = tmp_path / name
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))
        return str(path)

    return write


@pytest.fixture
def emotions() -> Dataset:
    """Twenty rows, `text 0` ..., with the classes sad and glad by turns."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["sad", "glad"]), "n": Value("int32")})
    return Dataset.from_dict(
        {"text": [f"text {row}" for row in range(20)], "label": [0, 1] * 10, "n": range(20)}, features
    )
