"""Export what an experiment ships, checked on the experiment's own rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset

from kdlora.configfile import load_config
from kdlora.data.load import load_examples, load_splits
from kdlora.data.tasks import Task
from kdlora.deploy.encode import Text
from kdlora.deploy.export import ExportResult, Format, export_onnx
from kdlora.errors import ConfigError, DataError, did_you_mean
from kdlora.evidence.records import ExperimentLayout, read_results
from kdlora.experiment.arms import label_array

FORMATS: dict[str, tuple[Format, ...]] = {
    "onnx": ("onnx",),
    "onnx-int8": ("onnx-int8",),
    "all": ("onnx", "onnx-int8"),
}


def export_model(model: str | Path, to: str | Path, *, formats: str = "all", data: str | None = None) -> ExportResult:
    """Export an experiment's student, or any merged model folder, to ONNX and int8.

    Args:
        model: an experiment folder, or a model folder that says its task.
        to: the folder to write.
        formats: `onnx`, `onnx-int8` or `all`.
        data: labelled file to check the stages on; default: the experiment's validation rows, and its training
            rows where those are fewer than 2,000.

    Raises:
        ConfigError: for an unknown format.
        DataError: for int8 without rows to check it on.
        ParityError: if a stage does not reproduce the one before; the earlier stages are kept.
    """
    if formats not in FORMATS:
        raise ConfigError(f"--format {formats!r}: expected onnx, onnx-int8 or all.{did_you_mean(formats, FORMATS)}")
    layout = ExperimentLayout(Path(model))
    if not layout.config.exists():
        return _export_folder(Path(model), Path(to), FORMATS[formats], data)
    config = load_config(layout.config)
    task = Task.from_dict(read_results(layout.results)[0].task)
    if data is not None:
        rows, more = load_examples(data, task, id_column=config.data.id_column, labelled=True), None
    else:
        splits = load_splits(config.task, config.data)
        rows, more = splits.validation, splits.train
    return export_onnx(
        layout.student,
        to,
        texts=texts_of(rows),
        labels=label_array(rows),
        groups=list(rows["group"]) if "group" in rows.column_names else None,
        more_texts=() if more is None else texts_of(more.select(range(min(len(more), 2000)))),
        task=task,
        formats=FORMATS[formats],
        max_length=config.student.train.max_length,
    )


def texts_of(rows: Dataset) -> list[Text]:
    """Return the texts of a data set, pairs as tuples.

    Args:
        rows: canonical columns `text` and, for pairs, `text_pair`.
    """
    if "text_pair" in rows.column_names:
        return list(zip(rows["text"], rows["text_pair"], strict=True))
    return list(rows["text"])


def _export_folder(folder: Path, to: Path, formats: Sequence[Format], data: str | None) -> ExportResult:
    """Export a folder that belongs to no experiment."""
    if data is None:
        if "onnx-int8" in formats:
            raise DataError(
                f"{folder} is no experiment folder, so int8 has no rows to be checked on: give them with --data, "
                "or take --format onnx"
            )
        return export_onnx(folder, to, formats=formats)
    task = _stated_task(folder)
    rows = load_examples(data, task, labelled=True)
    return export_onnx(folder, to, texts=texts_of(rows), labels=label_array(rows), task=task, formats=formats)


def _stated_task(folder: Path) -> Task:
    """Read the task that a student of ours carries in its config."""
    file = folder / "config.json"
    stated = json.loads(file.read_text(encoding="utf-8")).get("kdlora_task") if file.exists() else None
    if stated is None:
        raise DataError(
            f"{folder} does not say which columns its task has; export the experiment folder, or take --format onnx"
        )
    return Task.from_dict(stated)
