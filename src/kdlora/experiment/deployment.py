"""Export what an experiment ships, checked on the experiment's own rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from kdlora.config import Config
from kdlora.configfile import load_config
from kdlora.data.augment import keep_unscored
from kdlora.data.load import Splits, load_examples, load_splits
from kdlora.data.spool import label_array, read_column, read_texts, spread_rows
from kdlora.data.tags import Words, split_words
from kdlora.data.tasks import Task
from kdlora.deploy.benchmark import benchmark
from kdlora.deploy.calibrate import fit_temperature, save_temperature
from kdlora.deploy.cascade import CascadeCurve, measure_cascade
from kdlora.deploy.decisions import Decisions, write_decisions
from kdlora.deploy.export import ExportResult, Format, ParityError, export_onnx
from kdlora.deploy.folder import DECISIONS, OPENVINO_INT8, Way, read_model_folder
from kdlora.deploy.gates import LabelledTexts, count_spans
from kdlora.deploy.hub import locate_model
from kdlora.deploy.predict import Classifier
from kdlora.deploy.runtimes import store_speeds, ways_to_run
from kdlora.deploy.tagger import Tagger, load_model
from kdlora.deploy.webpage import check_page
from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError, ModelError, did_you_mean, listed
from kdlora.evidence.predictions import read_examples
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.experiment.recording import (
    forget_decisions,
    logged,
    model_files,
    prepare_process,
    refuse_loss,
    shipped_record,
    splits_by_name,
)
from kdlora.experiment.scoring import groups_of, load_labelled, recorded_task
from kdlora.experiment.settle import closed, with_values
from kdlora.foreign import read_json
from kdlora.report.shipped import BenchmarkResult, Calibration
from kdlora.section import without_later_keys
from kdlora.system.integrity import hash_files, hash_json
from kdlora.system.ownership import remove
from kdlora.system.storage import write_json_atomic, write_text_atomic

logger = logging.getLogger(__name__)

CHECKED_ROWS = 20_000
"""So many labelled rows each stage of an export reads, on a CPU; a score's change is then known to about 0.2 points."""

FORMATS: dict[str, tuple[Format, ...]] = {
    "onnx": ("onnx",),
    "onnx-int8": ("onnx-int8",),
    "all": ("onnx", "onnx-int8"),
    "openvino": ("onnx", "onnx-int8", "openvino"),
}


def export_model(model: str | Path, to: str | Path, *, formats: str = "all", data: str | None = None) -> ExportResult:
    """Export an experiment's student, or any merged model folder, to ONNX and int8."""
    if formats not in FORMATS:
        raise ConfigError(
            f"--format {formats!r}: expected onnx, onnx-int8, all or openvino.{did_you_mean(formats, FORMATS)}"
        )
    place, wanted = locate_model(model), FORMATS[formats]
    layout, around = ExperimentLayout(place), ExperimentLayout(Path(to).resolve().parent)
    if around.config.exists() and around.onnx.name == Path(to).resolve().name:  # whose figures and promises would stay
        raise ConfigError(f"{to} is what `kdlora run` exports (export.formats); name another folder with --to")
    if layout.config.exists():
        config = load_config(layout.config)
        if layout.results.exists() and not layout.student.exists():
            raise ArtifactError(f"{place} ships no student; name the folder of a model")
        if data is None:
            splits = load_without_copies(config, layout)
            return _export_rows(config, layout, to, splits.validation, splits.train, formats=wanted)
        rows = load_labelled(data, config, recorded_task(layout))
        return _export_rows(config, layout, to, rows, formats=wanted)
    if data is None and formats != "onnx":
        raise DataError(
            f"{place} is no experiment folder, so int8 has no rows to be checked on: give them with --data, "
            "or take --format onnx"
        )
    return export_onnx(place, to, texts=() if data is None else _read_labelled([place], data), formats=wanted)


def benchmark_models(models: Sequence[Path], *, data: str | None = None, threads: int | None = None) -> BenchmarkResult:
    """Measure model folders side by side, on a labelled file where there is one; of an export all that runs here."""
    places = _locate(models)
    named: dict[str, Path | Way] = {}
    for place in places:
        ways: dict[str, Path | Way] = {f"{place} ({way.runtime} {way.precision})": way for way in ways_to_run(place)}
        named.update(ways or {str(place): place})
    result = benchmark(named, () if data is None else _read_labelled(places, data), threads=threads)
    speeds: dict[Path, dict[Way, dict[int, float]]] = {}
    for model, figures in zip(named.values(), result.models, strict=True):
        if isinstance(model, Way):
            speeds.setdefault(model.folder, {})[model] = figures.speeds
    for found in speeds.values():
        try:
            store_speeds(found)
        except (OSError, ArtifactError) as error:
            logger.warning("the measurement is not kept for runtime='auto': %s", error)
    return result


def benchmark_cascade(models: Sequence[Path], *, data: str | None = None, threads: int | None = None) -> CascadeCurve:
    """Score a small model that hands on to a large one, at every share of what is handed on."""
    if len(models) != 2 or data is None:
        raise ConfigError("a cascade wants two models, the small one first, and labelled rows: --data FILE")
    places = _locate(models)
    small, large = (Classifier.load(place, threads=threads, decisions="thresholds") for place in places)
    return measure_cascade(small, large, _read_labelled(places, data))


def _locate(models: Sequence[Path]) -> list[Path]:
    found = [locate_model(path) for path in models]
    return [ExperimentLayout(path).student if ExperimentLayout(path).config.exists() else path for path in found]


def _read_labelled(folders: Sequence[Path], data: str) -> LabelledTexts:
    """Read a labelled file by the task that a model folder of ours carries."""
    stated = next(filter(None, (read_model_folder(folder).task for folder in folders)), None)
    if stated is None:
        raise DataError(
            f"{folders[0]} does not say which columns its task has; name the experiment folder, or leave the data out"
        )
    task = Task.from_dict(stated)
    return labelled(load_examples(data, task, labelled=True), task)


def labelled(rows: Dataset, task: Task) -> LabelledTexts:
    return LabelledTexts(texts_of(rows), label_array(rows), task, groups_of(rows))


def texts_of(rows: Dataset) -> list[Any]:
    """Return the texts of a data set, pairs as tuples, with their words where these have labels."""
    texts, *pairs = read_texts(rows).values()
    if "starts" in rows.column_names:
        edges = [read_column(rows, name).to_pylist() for name in ("starts", "ends")]
        return list(map(Words, texts, *edges))
    return list(zip(texts, pairs[0], strict=True)) if pairs else list(texts)


def unseen_rows(splits: Splits, rows: Dataset, source: str) -> tuple[Dataset, int]:
    """Give the rows whose texts nothing was trained or chosen on, and how many others there were."""
    new = keep_unscored(rows, [part for part in (splits.train, splits.validation, splits.unlabelled) if part])
    if not len(new):
        raise DataError(f"all {len(rows)} texts of {source} are training, validation or unlabelled texts, too")
    return new, len(rows) - len(new)


def load_without_copies(config: Config, layout: ExperimentLayout) -> Splits:
    """Load an experiment's rows as it had them; of other ones, those that chose the student might be training rows."""
    splits, there = load_splits(config.task, config.data.without_copies), read_examples(layout.examples)
    if splits.task.label_names != (names := recorded_task(layout).label_names):
        raise ArtifactError(
            f"{layout.root}: the labels are others than when it ran, when they were {listed(names)}: the data changed "
            "since. Put back what was there, or run the config into another folder"
        )
    for split, rows in splits_by_name(splits, scored=True).items():
        kept = {name: one for (of, name), one in there.items() if of == split}
        found = {row["id"]: (row["text"], row.get("text_pair")) for row in rows}
        if found != {name: (one.text, one.text_pair) for name, one in kept.items()}:
            raise ArtifactError(
                f"{layout.root}: the {split} rows are others than when it ran: the data changed since. Put back what "
                "was there, or run the config into another folder"
            )
    return splits


def deploy_student(config: Config, layout: ExperimentLayout, say: Callable[[str], None]) -> tuple[str, ...]:
    """Calibrate and export the shipped student, and measure it beside its teacher; an export that is whole stays."""
    prepare_process(config)
    splits = load_without_copies(config, layout)
    notes: list[str] = []
    is_exported = holds(layout.exported, _mark(config, layout))
    # An export stays where only measuring is switched; by fitted thresholds the figures would be stale one day.
    if not (config.export.benchmark and layout.thresholds.exists()):
        switched = with_values(config, {"export.benchmark": not config.export.benchmark})
        is_exported |= holds(layout.deployed, _mark(switched, layout, layout.benchmark))
    if not is_exported:
        refuse_loss(layout.onnx)
        check_page(layout.page)
        # Nothing of an earlier deployment may stand beside a new export, or be taken for one.
        for place in (layout.deployed, layout.exported, layout.benchmark, layout.onnx, layout.page):
            remove(place)
        notes += forget_decisions(config, layout)
        save_temperature(layout.student, 1.0)
        calibration, told = _calibrate(config, layout, splits) if config.export.calibrate else (None, [])
        lasting = _score_plain_texts(layout, splits)  # what no other file of the export says
        notes += told + lasting
        if formats := config.export.formats:
            with logged("export", "student", config.teacher_seed):
                try:
                    _export_rows(config, layout, layout.onnx, splits.validation, splits.train, formats=formats, say=say)
                except (ParityError, ModelError) as error:
                    notes.append(str(error))
                    lasting += [] if layout.export_record.exists() else [str(error)]
        if calibration is not None or lasting:
            write_json_atomic(layout.benchmark, asdict(BenchmarkResult(calibration=calibration, notes=tuple(lasting))))
    if not layout.thresholds.exists():  # which are decided later, and of this experiment's verb
        decide_as_run(config, layout)
    write_text_atomic(layout.exported, _mark(config, layout))
    if config.export.benchmark:
        found = read_json(layout.benchmark) if layout.benchmark.exists() else {}
        kept = {key: found[key] for key in ("calibration", "notes") if key in found}
        try:
            with logged("benchmark", "student", config.teacher_seed):
                figures = _benchmark_student(config, layout, splits, say)
            write_json_atomic(layout.benchmark, figures | kept)
        except KdLoraError as fault:  # as of a teacher that needs code of its own
            notes.append(f"The student was not measured: {fault}")
    write_text_atomic(layout.deployed, _mark(config, layout, layout.benchmark))
    remove(layout.exported)
    return tuple(notes)


def is_deployed(config: Config, layout: ExperimentLayout) -> bool:
    return holds(layout.deployed, _mark(config, layout, layout.benchmark))


def _mark(config: Config, layout: ExperimentLayout, *more: Path) -> str:
    """Fingerprint what a deployment depends on, and the files that it left."""
    files = [file for file in model_files(layout.student, layout.onnx) if file.name != DECISIONS]  # which is of these
    own = hash_files(layout.root, [*files, *more])
    settings = without_later_keys(config.export.model_dump(mode="json", exclude={"thresholds"}))
    return hash_json({"export": settings, "files": own})


def holds(file: Path, mark: str) -> bool:
    return file.exists() and file.read_text(encoding="utf-8", errors="replace") == mark


def _calibrate(config: Config, layout: ExperimentLayout, splits: Splits) -> tuple[Calibration | None, list[str]]:
    """Fit the student's temperature on validation rows; give the figures, and the sentences on them."""
    logits = load_model(layout.student).predict_logits(texts_of(splits.validation))
    labels, kind = label_array(splits.validation), splits.task.kind
    if kind == "tokens":  # a softmax a word, of those that have a label and could be read
        known = (labels >= 0) & np.isfinite(logits).all(axis=1)
        logits, labels, kind = logits[known], labels[known], "single-label"
    try:
        fitted = fit_temperature(logits, labels, kind)
    except DataError as fault:
        return None, [f"Not calibrated (export.calibrate): {fault}"]
    save_temperature(layout.student, fitted.temperature)
    if fitted.temperature == 1:
        return None, ["Not calibrated: all validation rows are right, and tell no temperature (export.calibrate)."]
    told = [
        f"Calibrated with temperature {fitted.temperature:.3f}: expected calibration error on the validation split "
        f"{fitted.ece_before:.4f} before, {fitted.ece_after:.4f} after."
    ]
    if config.student.train.class_weights is not None:
        told.append(
            "Class weights (student.train.class_weights) make rare classes too probable, which no temperature takes "
            "back; set the key to null where probabilities count."
        )
    return fitted, told


def _score_plain_texts(layout: ExperimentLayout, splits: Splits) -> list[str]:
    """Say how well a tagger marks texts whose words it finds itself, where those of the file are others."""
    given = labelled(splits.validation, splits.task)
    if all(list(text.starts) == split_words(text.text)[0] for text in given.texts if isinstance(text, Words)):
        return []
    right, wanted, marked = (sum(one.values()) for one in count_spans(given, Tagger.load(layout.student)))
    return [
        f"On plain texts, whose words it finds itself, the student has {200 * right / max(1, wanted + marked):.1f} "
        "entity F1 on the validation split."
    ]


def _export_rows(
    config: Config,
    layout: ExperimentLayout,
    to: str | Path,
    rows: Dataset,
    more: Dataset | None = None,
    *,
    formats: Sequence[Format],
    say: Callable[[str], None] | None = None,
) -> ExportResult:
    """Export `student/`, checked on some of the labelled rows and on the first 2,000 of some more."""
    if not config.export.min_recall:  # which is of all entities
        rows = spread_rows(rows, CHECKED_ROWS)
    ships = shipped_record(layout)
    return export_onnx(
        layout.student,
        to,
        texts=replace(labelled(rows, recorded_task(layout)), thresholds=ships.thresholds() if ships else {}),
        more_texts=() if more is None else texts_of(more.select(range(min(len(more), 2000)))),
        formats=formats,
        max_metric_drop=config.export.max_metric_drop,
        min_agreement=config.export.min_agreement,
        min_recall=config.export.min_recall,
        progress=say,
    )


def decide_as_run(config: Config, layout: ExperimentLayout) -> None:
    """Let teacher and student of several labels decide by the thresholds of their runs, from validation rows."""
    files = dict.fromkeys((layout.student, *exported_files(layout).values()), shipped_record(layout))
    taught = layout.run(config.teacher_arm, config.teacher_seed).record
    if layout.teacher.exists() and taught.exists():
        files[layout.teacher] = read_record(taught)
    for file, record in files.items():
        if record is not None and record.threshold is not None:
            folder = read_model_folder(file)
            write_decisions(folder, Decisions(thresholds=record.thresholds(folder.temperature)))


def exported_files(layout: ExperimentLayout) -> dict[str, Path]:
    files = {
        "student, ONNX": layout.onnx / "model.onnx",
        "student, int8": layout.onnx / "model_quantized.onnx",
        "student, OpenVINO int8": layout.onnx / OPENVINO_INT8,
    }
    return {name: file for name, file in files.items() if file.exists()}


def _benchmark_student(
    config: Config, layout: ExperimentLayout, splits: Splits, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure what is there of teacher, student and exports, on the rows of the headline."""
    folders = {"teacher": Path(config.teacher.fine_tuned or layout.teacher), "student": layout.student}
    models = {name: place for name, place in folders.items() if (place / "config.json").exists()}
    windows = splits.task.windows
    if "teacher" in models and read_model_folder(models["teacher"]).windows != windows:
        del models["teacher"]  # one that was given, and would be read otherwise than here
    models |= exported_files(layout)
    longest: int | None = closed(config.student.train).max_length
    apart = config.teacher.fine_tuned is None and config.teacher.train.max_length != longest
    apart |= read_model_folder(layout.student).max_length != longest  # its tokenizer's limit is a lower one
    if apart or windows is not None or splits.task.kind == "tokens":
        longest = None  # each model reads as far as it was trained to
    record = layout.run(config.teacher_arm, config.teacher_seed).record
    told = read_record(record) if longest in (None, config.teacher.train.max_length) and record.exists() else None
    score = None if told is None else told.score if splits.test is None else told.test_score
    result = benchmark(
        models,
        labelled(splits.test or splits.validation, splits.task),
        max_length=longest,
        threads=config.run.threads,
        scores={} if score is None else {"teacher": score},  # a large model takes minutes for a long test split
        progress=say,
    )
    return asdict(result) | {"split": "test" if splits.test else "validation"}
