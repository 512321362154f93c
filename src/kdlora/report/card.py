"""The model card of a shipped student: where it comes from, and what it scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from kdlora.evidence.records import RunRecord

FOLDER_IN_CARD = "PATH_OF_THIS_FOLDER"
"""Stands in the card's snippet until the model has a name on the Hub."""

_HUB_METRICS = {
    "accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
    "micro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
"""Our metric's name to the id that the Hub knows it by."""


def card_metadata(record: RunRecord, licence: str | None = None) -> dict[str, Any]:
    """Give the Hub's metadata of a student: what it comes from, and what it scores."""
    config = record.config
    base = config.get("student", {}).get("model") or config.get("teacher", {}).get("model")
    data = config.get("data", {}).get("path")
    metrics = _scored(record)[1]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "license": licence,
        "base_model": _hub_id(base),
        "base_model_relation": "finetune" if _hub_id(base) else None,
        "datasets": [data] if _hub_id(data) else None,
        "metrics": list(dict.fromkeys(_HUB_METRICS[name] for name in metrics if name in _HUB_METRICS)),
        "tags": ["kdlora", "knowledge-distillation", "lora"],
        "model-index": [{"name": f"{_plain(record.experiment)} student", "results": [_result(record)]}],
    }
    return {key: value for key, value in metadata.items() if value is not None}


def _result(record: RunRecord) -> dict[str, Any]:
    """Give the scores in the form of a model index."""
    split, metrics = _scored(record)
    data = record.config.get("data", {})
    source = _hub_id(data.get("path"))
    dataset = {
        "type": source or "custom",
        "name": source or _plain(record.experiment),
        "config": (data.get("subset") or record.task.get("name")) if source else None,
        "split": split,
        "revision": data.get("revision") if source else None,
    }
    return {
        "task": {"type": "text-classification", "name": f"Text classification ({record.task['kind']})"},
        "dataset": {key: value for key, value in dataset.items() if value is not None},
        "metrics": [
            {"type": _HUB_METRICS.get(name, name), "name": name, "value": round(value, 4)}
            for name, value in metrics.items()
            if value is not None
        ],
    }


def _scored(record: RunRecord) -> tuple[str, dict[str, float | None]]:
    """Name the split of the headline, and give its metrics."""
    if record.test_score is not None:
        return "test", record.test_metrics
    return "validation", record.metrics


def _hub_id(source: str | None) -> str | None:
    """Return the name of a model or data set where it is the Hub's; a path of this machine is none."""
    return None if source is None or Path(source).is_absolute() else source


def student_card(record: RunRecord, licence: str | None = None, *, reason: str = "") -> str:
    """Write the card of a student as Markdown with the Hub's metadata."""
    held_out = record.test_score is not None
    score = record.test_score if held_out else record.score
    metrics = _scored(record)[1]
    split = "test split" if held_out else "validation split, on which this seed was chosen"
    terms = f"`{licence}`, that of the base model" if licence else "that of the base model, which was not found here"
    names = ", ".join(_code(name) for name in record.task["label_names"])
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if value is not None)
    return f"""---
{yaml.safe_dump(card_metadata(record, licence), sort_keys=False, allow_unicode=True).strip()}
---
# {_plain(record.experiment)}: student

A text classifier ({record.task["kind"]}; {names}), trained as the arm `{record.arm}` with seed {record.seed} of a
kdlora experiment. The adapter is merged: this is a plain transformers model.
{f"{chr(10)}{_plain(reason)}{chr(10)}" if reason else ""}
- student: {_code(_short(record.student_model))}
- teacher: {_code(_short(record.teacher_model))}
- parameters: {record.total_parameters:,}, of which {record.trainable_parameters:,} were trained
- licence: {terms}
- training rows: {record.rows.get("train", 0):,}, fingerprint `{record.fingerprints.get("data", "")[:16]}`\
{_unlabelled(record)}
- kdlora {record.versions.get("kdlora", "")}, torch {record.versions.get("torch", "")}, \
transformers {record.versions.get("transformers", "")}; finished {record.finished}

Score {"not defined" if score is None else f"{score:.2f} of 100"} on the {split}:

| metric | value |
|---|---|
{figures}

```python
from transformers import pipeline

classify = pipeline("text-classification", model="{FOLDER_IN_CARD}")
```
"""


def _unlabelled(record: RunRecord) -> str:
    """Name the rows that only the teacher labelled, where this arm learnt from them."""
    count = record.rows.get("unlabelled", 0)
    return f"\n- unlabelled rows, labelled by the teacher: {count:,}" if count and record.arm.startswith("kd-") else ""


def _short(source: str | None) -> str:
    """Name a local model by its folder, so that a card carries no path of the machine."""
    if source is None:
        return "none"
    head, separator, rest = source.partition(", layers ")
    return (Path(head).name if Path(head).is_absolute() else head) + separator + rest


def _code(text: str) -> str:
    """Quote text for Markdown, whatever it holds."""
    flat = " ".join(text.split())
    fence = "`" * (max((len(run) for run in re.findall("`+", flat)), default=0) + 1)
    return f"{fence} {flat} {fence}" if "`" in flat else f"`{flat}`"


def _plain(text: str) -> str:
    return "".join(character for character in " ".join(text.split()) if character not in "*_`<>[]|#")
