"""What the tests of whole experiments share: small models and data, and how to look at folders."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kdlora.config import Config
from kdlora.configfile import build_config
from kdlora.data.logit_table import write_table
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.records import ExperimentLayout

ARMS = ["fft", "lora", "kd-lora", "student-fft", "student-lora", "kd-fft"]
FAST = {"epochs": 2, "batch_size": 8, "learning_rate": 5e-3, "max_length": 128}


@dataclass(frozen=True)
class Workshop:
    """Models and data that small experiments are made of; read only."""

    teacher: Path
    student: Path
    train: Path
    validation: Path

    def values(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Give the sections of a config of one arm without a teacher; changes replace keys of a section."""
        values: dict[str, Any] = {
            "name": "small",
            "recipe": "paper",
            "task": {},
            "data": {"train": str(self.train), "validation": str(self.validation)},
            "teacher": {"model": str(self.teacher), "train": FAST},
            "student": {"model": str(self.student), "train": FAST},
            "run": {"arms": ["student-lora"], "seeds": [0], "precision": "fp32", "device": "cpu", "threads": 1},
            "export": {"formats": [], "benchmark": False},
        }
        for section, content in (changes or {}).items():
            values[section] = {**values[section], **content} if isinstance(values.get(section), dict) else content
        return values

    def config(self, changes: Mapping[str, Any] | None = None) -> Config:
        """Give such a config."""
        return build_config(self.values(changes))


class Evil:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def numbered(count: int, seed: int) -> list[dict[str, str]]:
    """Make rows of texts that occur once."""
    from tiny import sentiment_rows

    return [row | {"text": f"{row['text']} ({seed}, {n})"} for n, row in enumerate(sentiment_rows(count, seed))]


def flags(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Give rows three labels that may hold together."""
    return [
        {"id": row["id"], "text": row["text"], "praise": int(row["label"] == "positive")}
        | {name: int(name in row["text"]) for name in ("film", "music")}
        for row in rows
    ]


def predicted(layout: ExperimentLayout, arm: str, seed: int = 0, split: str = "validation") -> Predictions:
    """Read on what a run was scored."""
    return read_predictions(layout.run(arm, seed).predictions).only(split)


def answers(folder: Path, *texts: list[str], adapter: bool = False) -> np.ndarray:
    """Give what a saved model, or an adapter with its base, says by transformers and PEFT alone."""
    import torch  # here, as above: most tests do without
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    kind = AutoPeftModelForSequenceClassification if adapter else AutoModelForSequenceClassification
    model = kind.from_pretrained(folder, **({"num_labels": 3} if adapter else {})).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "student" if adapter else folder)
    with torch.no_grad():
        return model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits.numpy()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which is made where there is none."""
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


def read_rows(path: Path | str) -> list[dict[str, str]]:
    """Read a CSV file."""
    with Path(path).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Note every file below a folder but its locks, with its time and a hash of its content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def copy_experiment(folder: Path, to: Path) -> Path:
    """Copy an experiment folder, so that a test may change it; times stay."""
    shutil.copytree(folder, to, copy_function=shutil.copy2)
    return to


def processes_marked(mark: str) -> list[int]:
    """List the live processes that have a text in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return [process for process in found if process != os.getpid()]


def write_collection(folder: Path) -> Path:
    """Make the folder of a collection of one text that the model M labelled."""
    folder.mkdir()
    names = ["negative", "positive"]
    logits = {f"logit:{name}": pa.array([0.5], pa.float32()) for name in names}
    digest = write_table(folder / "part.parquet", {"id": pa.array(["a"]), "text": pa.array(["a text"]), **logits})
    shard = {"file": "part.parquet", "sha256": digest, "rows": 1, "truncated": 0}
    about = {"schema_version": 1, "complete": True, "model": "M", "texts": 1, "label_names": names, "versions": {}}
    edit_json(folder / "collection.json", **about, fingerprint="f", ingredients={"weights": "w"}, shards=[shard])
    return folder
