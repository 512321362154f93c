"""Score a model or a table on the splits of an experiment, time it, and keep its logits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlora.config import Config
from kdlora.configfile import load_config
from kdlora.data.load import Splits, load_examples
from kdlora.data.tasks import Task
from kdlora.distil.precision import resolve_device
from kdlora.errors import ArtifactError, DataError
from kdlora.evidence.metrics import compute_metrics, score
from kdlora.evidence.predictions import Predictions, write_predictions
from kdlora.evidence.records import ExperimentLayout, Latency, RunLayout, RunRecord, read_results
from kdlora.experiment.arms import Evaluation, evaluate, label_array
from kdlora.experiment.inputs import load_teacher, read_table
from kdlora.experiment.recording import add_size, now, splits_by_name
from kdlora.experiment.settle import cut_at
from kdlora.models.encoders import Encoder, load_fine_tuned

_LATENCY_SECONDS = 1.0
"""For each batch size; a suite times thousands of models."""


def score_given_teacher(config: Config, layout: ExperimentLayout, splits: Splits, record: RunRecord) -> RunRecord:
    """Score a teacher that was given: a model, or a table on the splits that it covers."""
    place = layout.run("fft", record.seed)
    if config.teacher.is_table:
        record = _score_table(config, splits, record, place)
    else:
        encoder, columns = load_teacher(config, splits.task)
        encoder.model.to(resolve_device(config.run.device))
        record = score_model(record, encoder, splits, cut_at(config.teacher.train), place, columns)
        record = record.model_copy(update={"notes": [*record.notes, "the teacher was given: evaluated, not trained"]})
    return record.model_copy(update={"status": "finished", "finished": now()})


def score_model(
    record: RunRecord,
    encoder: Encoder,
    splits: Splits,
    max_length: int,
    place: RunLayout,
    columns: Sequence[int] | None = None,
) -> RunRecord:
    """Score a plain model on validation and test, keep its logits, size it and time it."""
    scored, start = splits_by_name(splits, scored=True), time.perf_counter()
    results = {
        split: evaluate(encoder.model, encoder.tokenizer, rows, splits.task, max_length=max_length, columns=columns)
        for split, rows in scored.items()
    }
    _keep_predictions(place, splits.task, scored, {split: result.logits for split, result in results.items()})
    latency = measure_latency(
        encoder.model,
        encoder.tokenizer,
        splits.validation,
        max_length=max_length,
        limit_seconds=_LATENCY_SECONDS,
    )
    seconds = (record.evaluation_seconds or 0.0) + time.perf_counter() - start
    update = {"latency": latency, "evaluation_seconds": seconds}
    return _scored(add_size(record, encoder.model), results).model_copy(update=update)


def _scored(record: RunRecord, results: dict[str, Evaluation]) -> RunRecord:
    update: dict[str, Any] = {"score": results["validation"].score, "metrics": results["validation"].metrics}
    update["truncated"] = record.truncated | {split: result.truncated for split, result in results.items()}
    if "test" in results:
        update |= {"test_score": results["test"].score, "test_metrics": results["test"].metrics}
    return record.model_copy(update=update)


def _keep_predictions(place: RunLayout, task: Task, scored: dict[str, Dataset], logits: dict[str, np.ndarray]) -> None:
    write_predictions(
        place.predictions,
        Predictions(
            ids=tuple(identifier for rows in scored.values() for identifier in rows["id"]),
            split=tuple(split for split, rows in scored.items() for _ in range(len(rows))),
            logits=np.concatenate([logits[split] for split in scored]),
            label_names=task.label_names,
            labels=np.concatenate([label_array(rows) for rows in scored.values()]),
            groups=_groups(scored),
        ),
    )


def score_outputs(record: RunRecord, splits: Splits, outputs: dict[str, np.ndarray], place: RunLayout) -> RunRecord:
    """Score given outputs, and keep them as predictions.

    Args:
        record: of the run.
        splits: the task with its examples.
        outputs: `(rows, labels)` by split, validation among them.
        place: the run's folder.
    """
    scored = {split: rows for split, rows in splits_by_name(splits, scored=True).items() if split in outputs}
    _keep_predictions(place, splits.task, scored, outputs)
    return _scored(record, {split: _evaluation(splits.task, rows, outputs[split]) for split, rows in scored.items()})


def _score_table(config: Config, splits: Splits, record: RunRecord, place: RunLayout) -> RunRecord:
    """Score a table of teacher outputs on the splits that it covers; the rest is not available."""
    scored: dict[str, Dataset] = {}
    logits: dict[str, np.ndarray] = {}
    notes = list(record.notes)
    for split, rows in (("validation", splits.validation), ("test", splits.test)):
        if rows is None:
            continue
        try:
            attached = read_table(config, splits.task, split).attach(rows)
        except DataError as error:
            notes.append(f"the teacher's score on the {split} split is not available: {error}")
            continue
        scored[split] = rows
        logits[split] = np.asarray(attached.with_format("numpy")["teacher_logits"], dtype=np.float32)
    if "validation" in scored:
        record = score_outputs(record, splits, logits, place)
    return record.model_copy(update={"notes": notes})


def _groups(scored: dict[str, Dataset]) -> tuple[str, ...] | None:
    if not all("group" in rows.column_names for rows in scored.values()):
        return None
    return tuple(group for rows in scored.values() for group in rows["group"])


def _evaluation(task: Task, rows: Dataset, logits: np.ndarray) -> Evaluation:
    metrics = compute_metrics(task, logits, label_array(rows), _groups({"": rows}))
    return Evaluation(score(task, metrics), metrics, logits, 0)


def evaluate_experiment(folder: str | Path, data: str, *, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Score the shipped student, and the teacher where it is there, on another labelled file."""
    layout = ExperimentLayout(Path(folder))
    if not layout.config.exists() or not layout.results.exists():
        raise ArtifactError(
            f"{layout.root} holds no finished experiment ({layout.results.name}); run it first: kdlora run"
        )
    config = load_config(layout.config)
    if not trust_remote_code:  # the folder says what its author trusted
        teacher = config.teacher.model_copy(update={"trust_remote_code": False})
        config = config.model_copy(update={"teacher": teacher})
    task = Task.from_dict(read_results(layout.results)[0].task)
    examples = load_examples(data, task, id_column=config.data.id_column, labelled=True)
    rows = []
    if layout.student.exists():
        encoder, columns = load_fine_tuned(str(layout.student), task)
        rows.append(_row("student", encoder, examples, task, cut_at(config.student.train), columns))
    if layout.teacher.exists() or config.teacher.fine_tuned is not None:
        encoder, columns = load_teacher(config, task, layout.teacher)
        rows.append(_row("teacher", encoder, examples, task, cut_at(config.teacher.train), columns))
    if not rows:
        raise ArtifactError(f"{layout.root} holds no model to evaluate: no student was shipped, and no teacher trained")
    return rows


def _row(
    name: str, encoder: Encoder, examples: Dataset, task: Task, max_length: int, columns: Sequence[int]
) -> dict[str, Any]:
    result = evaluate(encoder.model, encoder.tokenizer, examples, task, max_length=max_length, columns=columns)
    return {
        "model": name,
        "examples": len(examples),
        "score": result.score,
        "metrics": result.metrics,
        "truncated": result.truncated,
    }


def time_calls(
    call: Callable[[Any], object],
    inputs: Sequence[Any],
    *,
    warm_up: int = 5,
    repeats: int = 50,
    limit_seconds: float = 10.0,
) -> tuple[float, float]:
    """Time a call over a cycle of inputs."""
    if not inputs or repeats < 1:
        raise ValueError("expected at least one input and one repeat")
    begin = time.perf_counter()
    for turn in range(warm_up):
        if turn and time.perf_counter() - begin > limit_seconds / 2:
            break
        call(inputs[turn % len(inputs)])
    times: list[float] = []
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > limit_seconds:
            break
        start = time.perf_counter()
        call(inputs[turn % len(inputs)])
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    return float(p50), float(p95)


def measure_latency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 50,
    limit_seconds: float = 10.0,
) -> list[Latency]:
    """Time the forward pass of a model on real texts, tokenised beforehand, in the model's own precision."""
    device = next(model.parameters()).device

    def forward(batch: Mapping[str, Any]) -> None:
        model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    was_training = model.training
    model.eval()
    result = []
    try:
        with torch.inference_mode():
            for size in batch_sizes:
                batches = [
                    {name: tensor.to(device) for name, tensor in _encode(tokenizer, chunk, max_length).items()}
                    for chunk in _cycle_rows(rows, size, batches=repeats)
                ]
                p50, p95 = time_calls(forward, batches, repeats=repeats, limit_seconds=limit_seconds)
                result.append(Latency(batch_size=size, p50_ms=p50, p95_ms=p95, threads=torch.get_num_threads()))
    finally:
        model.train(was_training)
    return result


def _cycle_rows(rows: Dataset, size: int, *, batches: int) -> list[dict[str, list[str]]]:
    """Cut the first rows into full batches; as many as there are rows for, at least one."""
    if not len(rows):
        raise ValueError("expected at least one row to time the model on")
    count = min(batches, max(1, len(rows) // size))
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    chosen = [[(start * size + row) % len(rows) for row in range(size)] for start in range(count)]
    return [{name: [rows[row][name] for row in numbers] for name in columns} for numbers in chosen]


def _encode(tokenizer: PreTrainedTokenizerBase, chunk: dict[str, list[str]], max_length: int) -> Mapping[str, Any]:
    """Tokenise one batch, cut to what both the caller and the model's positions allow."""
    limit = min(max_length, tokenizer.model_max_length)
    encoded: Mapping[str, Any] = tokenizer(
        chunk["text"], chunk.get("text_pair"), truncation=True, max_length=limit, padding=True, return_tensors="pt"
    )
    return encoded
