"""Score a model or a table on the splits of an experiment, time it, keep its logits, and doubt a teacher."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlora.config import DISTILLED_ARMS, TEACHER_ARMS, Config
from kdlora.configfile import load_config
from kdlora.data.augment import keep_unscored
from kdlora.data.batches import Collator, tokenise
from kdlora.data.load import Splits, load_examples, load_splits
from kdlora.data.logit_table import as_offsets
from kdlora.data.parquet import read_batches
from kdlora.data.spool import label_array, read_column, text_columns
from kdlora.data.tasks import Task
from kdlora.data.windows import WindowSettings
from kdlora.data.word_tokens import split_windows, word_columns, word_offsets
from kdlora.deploy.decisions import read_decisions
from kdlora.deploy.folder import TEMPERATURE_KEY, read_model_folder
from kdlora.distil.cpu_kernels import fast_reading
from kdlora.distil.inference import hash_model, predict_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import evaluating, resolve_device
from kdlora.errors import ArtifactError, DataError, KdLoraError, listed
from kdlora.evidence.defer import shift_logits
from kdlora.evidence.metrics import compute_metrics, fit_shift, predict_labels, score
from kdlora.evidence.predictions import Predictions, read_predictions, write_predictions
from kdlora.evidence.ranking import counts_from_logits
from kdlora.evidence.records import ExperimentLayout, Latency, RunLayout, RunRecord, read_record, read_results
from kdlora.experiment.recording import finish, splits_by_name
from kdlora.experiment.settle import closed, doubts_of_units, load_teacher, read_table, stored_logits, with_values
from kdlora.models.adapters import count_parameters
from kdlora.models.encoders import Encoder, load_fine_tuned
from kdlora.report.wording import arm_title
from kdlora.system.integrity import hash_json
from kdlora.system.ownership import refuse_links

logger = logging.getLogger(__name__)

_BATCH_SIZES = (1, 32)
_TIMED = ((1, 5, 0.5), (3, 50, 1.0))
"""Calls to warm up, and to time: at least, at most, and seconds; a suite times thousands of models."""
_FEWEST_ROWS = 3
"""Validation rows, or entities, of a class before it counts as unknown to a teacher that gets none of them right."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on one split."""

    score: float  # the task's main figure, 0 to 100
    metrics: dict[str, float]  # every metric, as fractions
    # float32 (examples, labels), in row order, regression on its own scale; for tokens (words, labels)
    logits: np.ndarray = field(repr=False)
    truncated: int  # texts that were cut


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Dataset,
    task: Task,
    *,
    max_length: int | None = None,
    columns: Sequence[int] | None = None,
) -> Evaluation:
    """Score a model on labelled examples, in fp32, as it would be shipped.

    Args:
        model: a plain model, its adapter merged.
        tokenizer: the model's own.
        examples: rows with `text`, `label`, for MNLI `group`, for tokens `starts` and `ends`.
        task: kind, labels and metrics.
        max_length: longest input in tokens; default: what the model was trained on, else its own limit.
        columns: column of the model's output for each label of the task; default: the same order.

    Examples:
        >>> found = evaluate(model, trained.encoder.tokenizer, splits.validation, splits.task)
        >>> 0 <= found.score <= 100
        True
    """
    if "label" not in examples.column_names:
        raise DataError("these examples have no labels, so there is nothing to score; use predict")
    limit = max_length or getattr(model.config, "kdlora_max_length", None) or tokenizer.model_max_length
    data = tokenise(examples, tokenizer, limit, windows=task.windows)
    with fast_reading(model):
        logits = predict_logits(model, tokenizer, data)
    return _judge(task, examples, logits if columns is None else logits[:, list(columns)], data.truncated)


def _judge(task: Task, rows: Dataset, logits: np.ndarray, truncated: int = 0) -> Evaluation:
    metrics = compute_metrics(task, logits, label_array(rows), groups_of(rows), word_offsets(rows))
    return Evaluation(score(task, metrics), metrics, logits, truncated)


def groups_of(examples: Dataset) -> list[str] | None:
    return list(examples["group"]) if "group" in examples.column_names else None


def score_given_teacher(config: Config, layout: ExperimentLayout, splits: Splits, record: RunRecord) -> RunRecord:
    """Score a teacher that was given: a model, or a table on the splits that it covers."""
    place, outputs, notes = layout.run("fft", record.seed), {}, []
    if not config.teacher.is_table:
        encoder, columns = load_teacher(config, splits.task)
        given = record.fingerprints | {"given": hash_model(encoder.model)}
        record = record.model_copy(update={"fingerprints": given})
        encoder.model.to(resolve_device(config.run.device))
        record = score_model(record, encoder, splits, closed(config.teacher.train).max_length, place, columns)
        return finish(record, layout, [place.predictions], ["the teacher was given: evaluated, not trained"])
    for split, rows in splits_by_name(splits, scored=True).items():
        try:
            table, missing = _table_of(config, splits, split, rows), 0
            if record.asked is not None:
                table, missing = _with_unanswered(table, rows, split)
            attached = table.attach(rows)
        except DataError as error:
            notes.append(f"the teacher's score on the {split} split is not available: {error}")
            continue
        if missing:
            notes.append(f"{missing} of {len(rows)} {split} rows have no answer of the teacher and count as wrong")
        values = np.asarray(pc.list_flatten(read_column(attached, "teacher_logits")), dtype=np.float32)
        outputs[split] = values.reshape(-1, splits.task.num_labels)
    if "validation" in outputs:
        record = score_outputs(record, splits, outputs, place)
    taught = hash_json([one.fingerprint for one in stored_logits(config, layout, splits)])  # as its students have it
    record = record.model_copy(update={"fingerprints": record.fingerprints | {"teacher": taught}})
    return finish(record, layout, [place.predictions], notes)


def _table_of(config: Config, splits: Splits, split: str, rows: Dataset) -> TeacherLogits:
    """Read a table's rows of a split; where validation was drawn from the training rows, it is among those."""
    try:
        return read_table(config, splits.task, split)
    except DataError:
        wanted = set(rows["id"])
        if split != "validation" or not wanted.isdisjoint(splits.train["id"]):
            raise
        whole = read_table(config, splits.task, "train")
        if not wanted.issubset(map(str, whole.ids.to_pylist())):
            raise
        return whole


def _with_unanswered(table: TeacherLogits, rows: Dataset, split: str) -> tuple[TeacherLogits, int]:
    """Let a language model be wrong about the rows that it was asked about and did not answer; count them."""
    file = Path(table.source).with_name(f"{split}.parquet")  # all rows of its audit, answered or not
    audited = read_batches(file, ["id"]) if file.is_file() else ()
    unanswered = {name for batch in audited for name in batch["id"].to_pylist()}.difference(table.ids.to_pylist())
    missing = [place for place, name in enumerate(rows["id"]) if name in unanswered]
    if not missing or len(missing) == len(rows):
        return table, 0
    size = len(table.label_names)
    wrong = np.eye(size, dtype=np.float32)[(label_array(rows)[missing] + 1) % size]
    ids = pa.concat_arrays([table.ids, pa.array(list(rows.select(missing)["id"]), table.ids.type)])
    return replace(table, ids=ids, logits=np.concatenate([table.logits, wrong])), len(missing)


def score_model(
    record: RunRecord,
    encoder: Encoder,
    splits: Splits,
    max_length: int,
    place: RunLayout,
    columns: Sequence[int] | None = None,
) -> RunRecord:
    """Score a plain model on validation and test, keep its logits, size it and time it."""
    model, tokenizer, start = encoder.model, encoder.tokenizer, time.perf_counter()
    results = {
        split: evaluate(model, tokenizer, rows, splits.task, max_length=max_length, columns=columns)
        for split, rows in splits_by_name(splits, scored=True).items()
    }
    record = _add_scores(record, splits, results, place)
    latency = measure_latency(model, tokenizer, splits.validation, max_length=max_length, windows=splits.task.windows)
    update = {
        "latency": latency,
        "evaluation_seconds": (record.evaluation_seconds or 0.0) + time.perf_counter() - start,
        "total_parameters": count_parameters(model).total,
        "size_bytes": sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()),
    }
    return record.model_copy(update=update)


def score_outputs(record: RunRecord, splits: Splits, outputs: dict[str, np.ndarray], place: RunLayout) -> RunRecord:
    """Score given outputs `(rows, labels)` by split, validation among them, and keep them as predictions."""
    parts = splits_by_name(splits, scored=True)
    results = {split: _judge(splits.task, parts[split], logits) for split, logits in outputs.items()}
    return _add_scores(record, splits, results, place)


def _add_scores(record: RunRecord, splits: Splits, results: dict[str, Evaluation], place: RunLayout) -> RunRecord:
    scored = {split: rows for split, rows in splits_by_name(splits, scored=True).items() if split in results}
    groups = [groups_of(rows) for rows in scored.values()]
    task, shift = splits.task, 0.0
    if task.kind == "multi-label":
        shift, _ = fit_shift(task, results["validation"].logits, label_array(splits.validation))
    edges = [edge for rows in scored.values() if (edge := word_offsets(rows)) is not None]
    predictions = Predictions(
        ids=tuple(identifier for rows in scored.values() for identifier in rows["id"]),
        split=tuple(split for split, rows in scored.items() for _ in range(len(rows))),
        logits=np.concatenate([results[split].logits for split in scored]),
        label_names=splits.task.label_names,
        labels=np.concatenate([label_array(rows) for rows in scored.values()]),
        groups=None if None in groups else tuple(name for part in groups for name in part or ()),
        offsets=as_offsets(np.concatenate([np.diff(edge) for edge in edges])) if edges else None,
        shift=shift,
    )
    write_predictions(place.predictions, predictions)
    update: dict[str, Any] = {"truncated": record.truncated | {name: one.truncated for name, one in results.items()}}
    if shift:
        results = {split: _judge(task, rows, results[split].logits - shift) for split, rows in scored.items()}
        told = "A label is said above the threshold that suits the score on validation best (run.json: threshold)."
        update |= {"threshold": 1 / (1 + math.exp(-shift)), "notes": [*record.notes, told]}
    for split, result in results.items():
        prefix = "" if split == "validation" else f"{split}_"
        update |= {f"{prefix}score": result.score, f"{prefix}metrics": result.metrics}
    return record.model_copy(update=update)


def measure_latency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int,
    windows: WindowSettings | None = None,
) -> list[Latency]:
    """Time the forward pass of a model on real texts, tokenised beforehand, in the model's own precision."""
    device = next(model.parameters()).device
    columns, words = text_columns(rows), word_columns(rows)
    longest = min(max_length, tokenizer.model_max_length)  # what both the caller and the model's positions allow

    def encode(numbers: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        if windows is None and not words:
            texts = ([rows[row % len(rows)][name] for row in numbers] for name in columns)
            batch = tokenizer(*texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
            return [dict(batch.to(device))]
        chosen = rows.select([row % len(rows) for row in numbers]).select_columns([*columns, *words])
        read = tokenise(chosen, tokenizer, longest, windows=windows, quiet=True).dataset
        parts = sorted((part for row in read for part in split_windows(row)), key=lambda one: len(one["input_ids"]))
        join, most = Collator.of(tokenizer, "single-label", longest), _BATCH_SIZES[-1]
        passes = (join(parts[start : start + most]) for start in range(0, len(parts), most))
        return [{name: tensor.to(device) for name, tensor in one.items()} for one in passes]

    def forward(passes: Sequence[Mapping[str, Any]]) -> None:
        for batch in passes:
            model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found = []
    with evaluating(model), torch.inference_mode():
        for size in _BATCH_SIZES:
            count = min(_TIMED[-1][1], max(1, len(rows) // size))  # full batches, as many as there are rows for
            batches = [encode(range(start * size, (start + 1) * size)) for start in range(count)]
            p50, p95 = time_calls(forward, batches)
            found.append(Latency(batch_size=size, p50_ms=p50, p95_ms=p95, threads=torch.get_num_threads()))
    return found


def time_calls(call: Callable[[Any], object], inputs: Sequence[Any]) -> tuple[float, float]:
    """Time a call over a cycle of inputs, warmed up: median and 95th percentile in milliseconds."""
    found: list[float] = []
    for least, most, seconds in _TIMED:
        found, begin = [], time.perf_counter()
        while len(found) < most and (len(found) < least or time.perf_counter() - begin <= seconds):
            start = time.perf_counter()
            call(inputs[len(found) % len(inputs)])
            found.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(found, [50, 95])
    return float(p50), float(p95)


def doubts_of_teacher(config: Config, layout: ExperimentLayout, records: Sequence[RunRecord]) -> list[str]:
    """Say whether a control is above the teacher in the mean, or it gets no row of a class right, and what to do."""
    scores = {(one.arm, one.seed): one.score for one in records if one.status == "finished" and one.score is not None}
    arm, seed, taught = config.teacher_arm, config.teacher_seed, TEACHER_ARMS | DISTILLED_ARMS
    if (own := scores.get((arm, seed))) is None:
        return []
    found = []
    controls = [
        (fmean(one for (name, _), one in scores.items() if name == other), other)
        for other in {other for other, _ in scores} - taught
    ]
    best, control = max(controls, default=(own, ""))
    if best > own:
        found.append(
            f"The teacher is below a control without a teacher, {arm_title(control)}: on validation it has {own:.1f}, "
            f"the control {best:.1f}. What it teaches can then hardly help."
        )
    place, task = layout.run(arm, seed).predictions, next(Task.from_dict(one.task) for one in records)
    if place.exists() and (unknown := unknown_classes(task, read_predictions(place))):
        thing, names = "entity" if task.kind == "tokens" else "row", listed(map(repr, unknown))
        found.append(
            f"The teacher gets no validation {thing} of {names} right: it does not know what it would teach there."
        )
    if place.exists() and task.kind == "regression":
        seen = read_predictions(place).only("validation")
        found += doubts_of_units(seen.logits[:, 0], np.asarray(seen.labels), "labels")
    remedy = "Train the teacher longer or at another rate (teacher.train), or name another teacher.model."
    if config.given_teacher:
        remedy = "Give another teacher, or ship the control."
    return [f"{sentence} {remedy}" for sentence in found]


def unknown_classes(task: Task, predictions: Predictions) -> list[str]:
    """Name the classes, or types of entities, of which a teacher gets nothing in the validation rows right."""
    if task.kind == "regression":
        return []
    seen = predictions.only("validation")
    labels, said = np.asarray(seen.labels, dtype=np.int64), predict_labels(task, seen.decided, seen.offsets)
    if task.kind == "tokens":
        known, _, rows = counts_from_logits(task.label_names, seen.logits, labels, seen.offsets).sum(axis=0).T
    elif task.kind == "multi-label":
        rows, known = labels.sum(axis=0), (labels & said).sum(axis=0)
    else:
        rows, known = (np.bincount(part, minlength=task.num_labels) for part in (labels, labels[said == labels]))
    names = task.label_types or task.label_names
    return [name for place, name in enumerate(names) if rows[place] >= _FEWEST_ROWS and not known[place]]


def open_finished(folder: str | Path) -> tuple[ExperimentLayout, Config, Task]:
    """Open an experiment some runs of which have ended."""
    layout = ExperimentLayout(Path(folder))
    refuse_links(layout.root)
    task, config = recorded_task(layout), load_config(layout.config)
    return layout, config, task


def recorded_task(layout: ExperimentLayout) -> Task:
    records = read_results(layout.results)
    if not records:
        raise ArtifactError(f"{layout.results}: no run has ended yet; finish the experiment first: kdlora run")
    return Task.from_dict(records[0].task)


def load_labelled(data: str, config: Config, task: Task) -> Dataset:
    """Load another file of labelled rows for an experiment's task."""
    ordered = config.task.label_names is not None
    return load_examples(data, task, id_column=config.data.id_column, labelled=True, ordered=ordered)


def evaluate_experiment(folder: str | Path, data: str, *, trust_remote_code: bool = False) -> list[dict[str, Any]]:
    """Score the shipped student and the teacher if it is there, by their thresholds, on another labelled file."""
    layout, config, task = open_finished(folder)
    if not trust_remote_code:  # the folder says what its author trusted
        config = with_values(config, {"teacher.trust_remote_code": False})
    examples = load_labelled(data, config, task)
    with contextlib.suppress(KdLoraError, OSError):  # the experiment's own data may be elsewhere
        splits = load_splits(config.task, config.data.without_copies)
        seen = [part for part in (splits.train, splits.validation, splits.unlabelled) if part is not None]
        if known := len(examples) - len(keep_unscored(examples, seen)):
            logger.warning("%d of %d texts are training, validation or unlabelled texts", known, len(examples))

    def row(
        name: str, found: tuple[Encoder, list[int]], max_length: int, at: Callable[[float], Mapping[str, float]]
    ) -> dict[str, Any]:
        encoder, columns = found
        thresholds = at(temperature := getattr(encoder.model.config, TEMPERATURE_KEY, None) or 1.0)
        encoder.model.to(resolve_device("cpu" if config.run.device == "cpu" else "auto"))  # it may come from a GPU
        result = evaluate(encoder.model, encoder.tokenizer, examples, task, max_length=max_length, columns=columns)
        if thresholds:
            shifted = shift_logits(result.logits, task.label_names, thresholds, temperature)
            result = _judge(task, examples, shifted, result.truncated)
        figures = {"score": result.score, "metrics": result.metrics, "truncated": result.truncated}
        return {"model": name, "examples": len(examples), **figures, "thresholds": dict(thresholds)}

    rows = []
    if layout.student.exists():
        thresholds = read_decisions(read_model_folder(layout.student)).thresholds
        model = load_fine_tuned(str(layout.student), task)
        rows.append(row("student", model, closed(config.student.train).max_length, lambda _: thresholds))
    if layout.teacher.exists() or config.teacher.fine_tuned is not None:
        try:
            found = load_teacher(config, task, layout.teacher)
        except KdLoraError as fault:
            if not rows:
                raise
            logger.warning("the teacher is not scored: %s", fault)
        else:
            scored = layout.run(config.teacher_arm, config.teacher_seed).record
            longest, own = closed(config.teacher.train).max_length, read_record(scored) if scored.exists() else None
            rows.append(row("teacher", found, longest, lambda at: {} if own is None else own.thresholds(at)))
    if not rows:
        raise ArtifactError(f"{layout.root} holds no model to evaluate: no student was shipped, and no teacher trained")
    return rows
