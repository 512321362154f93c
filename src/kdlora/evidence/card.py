"""The model card of a shipped student: where it comes from, and what it scores."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from kdlora.evidence.records import RunRecord


def student_card(record: RunRecord) -> str:
    """Write the card of a student as Markdown with the Hub's metadata.

    Args:
        record: the run that is shipped.
    """
    held_out = record.test_score is not None
    score = record.test_score if held_out else record.score
    metrics = record.test_metrics if held_out else record.metrics
    split = "test split" if held_out else "validation split, on which this seed was chosen"
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["kdlora", "knowledge-distillation", "lora"],
    }
    names = ", ".join(_code(name) for name in record.task["label_names"])
    figures = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items() if value is not None)
    return f"""---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---
# {_plain(record.experiment)}: student

A text classifier ({record.task["kind"]}; {names}), trained as the arm `{record.arm}` with seed {record.seed} of a
kdlora experiment. The adapter is merged: this is a plain transformers model.

- student: {_code(_short(record.student_model))}
- teacher: {_code(_short(record.teacher_model))}
- parameters: {record.total_parameters:,}, of which {record.trainable_parameters:,} were trained
- training rows: {record.rows.get("train", 0):,}, fingerprint `{record.fingerprints.get("data", "")[:16]}`
- kdlora {record.versions.get("kdlora", "")}, torch {record.versions.get("torch", "")}, \
transformers {record.versions.get("transformers", "")}; finished {record.finished}

Score {"not defined" if score is None else f"{score:.2f} of 100"} on the {split}:

| metric | value |
|---|---|
{figures}

```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH_OF_THIS_FOLDER")
```
"""


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
