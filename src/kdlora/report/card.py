"""The model card of a shipped student: where it comes from, and what it scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from kdlora.config import DISTILLED_ARMS, LORA_ARMS
from kdlora.data.tasks import Task
from kdlora.evidence.records import RunRecord
from kdlora.foreign import as_code
from kdlora.report.page import engine
from kdlora.report.wording import figure, metric_title, model_title, of_label

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
    "entity_f1": "f1",
    "entity_precision": "precision",
    "entity_recall": "recall",
}
"""Our metric's name to the id that the Hub knows it by."""


def student_card(
    record: RunRecord,
    licence: str | None = None,
    *,
    reason: str = "",
    decisions: Sequence[str] = (),
    joins_words: bool = False,
) -> str:
    """Write the card; a tokenizer that `joins_words` marks the tokens that continue one."""
    (split, metrics), task = _scored(record), Task.from_dict(record.task)
    facts = {
        "record": record,
        "arm": _code(record.arm),
        "fingerprint": _code(record.fingerprints.get("data", "")[:16]),
        "metadata": yaml.safe_dump(card_metadata(record, licence), sort_keys=False, allow_unicode=True).strip(),
        "names": Markup(", ").join(map(_code, task.label_types or task.label_names)),
        "task": task,
        "joins_words": joins_words,
        "student": _code(_short(record.student_model)),
        "teacher": _code(_short(record.teacher_model))
        if record.arm in DISTILLED_ARMS
        else "none: it learnt from the labels",
        "licence": licence,
        "reason": reason,
        "decisions": list(decisions),
        "versions": defaultdict(str, record.versions),
        "split": split,
        "score": record.test_score if split == "test" else record.score,
        "metrics": metrics,
        "figures": {
            metric_title(of_label(name, task)): figure(value)
            for name, value in metrics.items()
            if value is not None and not (task.label_types and ":" in name)
        },
        "folder": FOLDER_IN_CARD,
    }
    return f"{engine('md').get_template('card.md').render(facts)}\n"


def card_metadata(record: RunRecord, licence: str | None = None) -> dict[str, Any]:
    config, data = record.config, record.config.get("data", {})
    base = _hub_id(config.get("student", {}).get("model") or config.get("teacher", {}).get("model"))
    source, (split, metrics) = _hub_id(data.get("path")), _scored(record)
    title = " ".join(record.experiment.split())
    taught = record.arm in DISTILLED_ARMS
    kind = "token-classification" if record.task["kind"] == "tokens" else "text-classification"
    dataset = {
        "type": source or "custom",
        "name": source or title,
        "config": (data.get("subset") or record.task.get("name")) if source else None,
        "split": split,
        "revision": data.get("revision") if source else None,
    }
    result = {
        "task": {"type": kind, "name": f"{kind.capitalize().replace('-', ' ')} ({record.task['kind']})"},
        "dataset": _known(dataset),
        "metrics": [
            {"type": _HUB_METRICS.get(name, name.partition(":")[0]), "name": name, "value": float(figure(value))}
            for name, value in metrics.items()
            if value is not None
        ],
    }
    metadata = {
        "library_name": "transformers",
        "pipeline_tag": kind,
        "license": licence,
        "base_model": base,
        "base_model_relation": "finetune" if base else None,
        "datasets": [source] if source else None,
        "metrics": list(dict.fromkeys(_HUB_METRICS[name] for name in metrics if name in _HUB_METRICS)),
        "tags": ["kdlora", *["knowledge-distillation"] * taught, *["lora"] * (record.arm in LORA_ARMS)],
        "model-index": [{"name": f"{title} student", "results": [result]}],
    }
    return _known(metadata)


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _scored(record: RunRecord) -> tuple[str, dict[str, float | None]]:
    return ("validation", record.metrics) if record.test_score is None else ("test", record.test_metrics)


def _hub_id(source: str | None) -> str | None:
    """Return the name of a model or data set where it is the Hub's; a path of this machine is none."""
    return None if source is None or Path(source).is_absolute() else source


def _short(source: str | None) -> str:
    return _hub_id(source) or model_title(source)


def _code(text: str) -> Markup:
    return Markup(as_code(text))
