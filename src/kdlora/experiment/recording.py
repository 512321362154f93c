"""What is kept of a run: what is known before and after its training, its log, its weights; and what ships."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset, disable_progress_bars
from transformers.utils.logging import disable_progress_bar

from kdlora.config import LORA_ARMS, STUDENT_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.spool import hash_columns
from kdlora.data.tasks import Task
from kdlora.deploy.folder import DECISIONS, MEASURED, TEMPERATURE_KEY, is_model_file
from kdlora.distil.inference import hash_model, hash_tokenizer
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device, settle_precision
from kdlora.distil.processes import current_processes
from kdlora.distil.train import Trained
from kdlora.distil.words import BAG_OF_WORDS
from kdlora.errors import ArtifactError, counted
from kdlora.evidence.predictions import ExampleText, write_examples
from kdlora.evidence.records import Asked, ExperimentLayout, RunRecord, read_record
from kdlora.experiment.settle import closed, load_base, settings_for
from kdlora.foreign import read_json
from kdlora.models.adapters import add_base, load_adapter, merge_student, save_adapter
from kdlora.models.encoders import Encoder, save_encoder
from kdlora.models.settings import read_licence
from kdlora.report.card import student_card
from kdlora.report.deferred import decision_sentences
from kdlora.report.findings import Choice, read_choice
from kdlora.section import DataConfig
from kdlora.system.environment import collect_versions, default_threads, describe_machine, git_state
from kdlora.system.integrity import hash_files, hash_json
from kdlora.system.ownership import is_ours_by_name, remove
from kdlora.system.storage import atomic_folder, write_json_atomic, write_text_atomic

_MEANING = {
    "data": "the data",
    "base": "the pretrained model, its weights or its tokenizer,",
    "teacher": "what the teacher says about the training rows",
    "processes": "the number of processes, and so the rows of a step,",
}
logger = logging.getLogger(__name__)


def splits_by_name(splits: Splits, *, scored: bool = False) -> dict[str, Dataset]:
    """Return the splits that an experiment has, or only those that models are scored on."""
    seen = {} if scored else {"train": splits.train, "unlabelled": splits.unlabelled}
    parts = seen | {"validation": splits.validation, "test": splits.test}
    return {name: part for name, part in parts.items() if part is not None}


def hash_splits(splits: Splits) -> str:
    parts = splits_by_name(splits).items()
    return hash_json({name: hash_columns(rows, sorted(rows.column_names)) for name, rows in parts})


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task's data, which a suite's runs may read by several `data` sections: by `row_settings`."""

    task: Task
    fingerprints: dict[tuple[Any, ...], str]  # of ids, texts and labels
    rows: dict[tuple[Any, ...], dict[str, int]]  # per split, with perturbed copies on their own
    notes: tuple[str, ...]

    def fingerprint(self, config: Config) -> str:
        return self.fingerprints[config.data.row_settings]

    def made(self, record: RunRecord, config: Config) -> bool:
        """Say whether a run had these rows, and labels of these names, whose codes alone are fingerprinted."""
        names = record.task.get("label_names")
        return record.fingerprints.get("data") == self.fingerprint(config) and names == list(self.task.label_names)


def count_rows(splits: Splits) -> dict[str, int]:
    rows = {name: len(part) for name, part in splits_by_name(splits).items()}
    rows |= {"unlabelled": rows.get("unlabelled", 0) - splits.copies, "copies": splits.copies}
    return {name: count for name, count in rows.items() if count}


def look_at(splits: Splits, data: DataConfig) -> TaskFacts:
    key = data.row_settings
    return TaskFacts(splits.task, {key: hash_splits(splits)}, {key: count_rows(splits)}, splits.notes)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def prepare_process(config: Config) -> None:
    """Set the threads by config or CPU limit, and leave the terminal to the experiment's own progress."""
    disable_progress_bar()
    disable_progress_bars()
    threads = config.run.threads or default_threads()
    if config.run.threads is not None or threads < torch.get_num_threads():
        torch.set_num_threads(threads)


@contextlib.contextmanager
def logged(stage: str, arm: str, seed: int) -> Iterator[None]:
    logger.info("begin %s %s seed %d", stage, arm, seed)
    yield
    logger.info("end %s %s seed %d", stage, arm, seed)


def blank_record(config: Config, arm: str, seed: int, facts: TaskFacts) -> RunRecord:
    """Start the record of a run with what is known without its process."""
    teacher, student = config.teacher, config.student
    student_name = student.model
    if student_name is None and student.from_teacher_layers is not None:
        student_name = f"{teacher.model}, layers {list(student.from_teacher_layers)}"
    folder = Path(teacher.probabilities or "").parent
    asked = None if teacher.probabilities is None else Asked.read(folder)
    if asked and Path(config.data.train or "").parent != folder:  # labels from elsewhere are none of the model's
        asked = dataclasses.replace(asked, own_labels=False)
    table = teacher.logits or teacher.probabilities
    teacher_name = teacher.fine_tuned or (asked.model if asked else table) or teacher.model
    models = {"words": BAG_OF_WORDS, "fft": teacher_name, "lora": teacher.model}
    return RunRecord(
        experiment=config.title(),
        task=facts.task.to_dict(),
        rows=facts.rows[config.data.row_settings],
        arm=arm,
        seed=seed,
        status="running",
        teacher_model=teacher_name,
        student_model=student_name,
        model=str(models.get(arm, student_name)),
        asked=asked,
        fingerprints={"config": config.fingerprint(), "data": facts.fingerprint(config)},
        versions=collect_versions(),
        machine=describe_machine(),
        git=git_state(),
        notes=list(facts.notes),
        config=config.model_dump(mode="json"),
    )


def new_record(config: Config, layout: ExperimentLayout, splits: Splits, arm: Arm, seed: int) -> RunRecord:
    record = blank_record(config, arm, seed, look_at(splits, config.data))
    if arm == "words":  # to ask a GPU would begin CUDA, whose memory would be recorded
        return record.model_copy(update={"precision": "fp32", "device": "cpu", "started": now()})
    precision, reason = settle_precision(config.run.precision, config.run.device, layout.precision)
    notes, on_cpu = list(record.notes), resolve_device(config.run.device).type == "cpu"
    if count := record.rows.get("unlabelled"):
        notes.append(
            f"{count} unlabelled rows: the teacher labelled them, and the distilled arms learn from them too; the "
            "other student arms see the labelled rows alone, as often as it takes for the same optimiser steps"
        )
    notes += [f"precision {precision}: {reason}", counted(torch.get_num_threads(), "thread")]
    device = "cpu" if on_cpu else str(torch.cuda.get_device_name())
    return record.model_copy(update={"precision": precision, "device": device, "started": now(), "notes": notes})


def hash_base(encoder: Encoder) -> str:
    return hash_json([hash_model(encoder.model, without=encoder.fresh), hash_tokenizer(encoder.tokenizer)])


def add_origin(
    record: RunRecord, layout: ExperimentLayout, encoder: Encoder, teacher: Sequence[TeacherLogits]
) -> RunRecord:
    """Add fingerprints of pretrained model and teacher's logits; refuse others than finished runs here began with."""
    own = record.fingerprints | {"base": hash_base(encoder)}
    if teacher:
        own["teacher"] = hash_json([one.fingerprint for one in teacher])
    if record.arm in STUDENT_ARMS:  # which are compared by equal steps
        own["processes"] = str(current_processes().count)
    for path in sorted(layout.shared.glob("**/runs/*/run.json")):
        other, is_here = read_record(path), path.is_relative_to(layout.runs)
        if other.status != "finished" or (is_here and (other.arm, other.seed) == (record.arm, record.seed)):
            continue
        for key, meaning in _MEANING.items():
            if _loaded(other) != _loaded(record) if key == "base" else not is_here:  # of a suite only the models
                continue
            if len({other.fingerprints.get(key), own.get(key)} - {None}) == 2:
                raise ArtifactError(
                    f"{meaning} changed since {other.arm} with seed {other.seed} was trained: {record.arm} with seed "
                    f"{record.seed} would not be comparable. Put back what was there, or name another folder with "
                    f"--out, or delete {layout.shared if key == 'base' else layout.root}"
                )
    return record.model_copy(update={"fingerprints": own})


def _loaded(record: RunRecord) -> tuple[Any, ...]:
    """Say of what, and as what, a pretrained model was loaded; one that reads words has a class of its own."""
    revisions = [(record.config.get(part) or {}).get("revision") for part in ("teacher", "student")]
    return record.model, record.task.get("kind") == "tokens", revisions


def add_training(record: RunRecord, trained: Trained, teacher: Sequence[TeacherLogits]) -> RunRecord:
    outcome, parameters = trained.outcome, trained.parameters
    names = ("train (by the teacher)", "unlabelled (by the teacher)")
    by_teacher = {name: logits.truncated for name, logits in zip(names, teacher, strict=False)}
    unseen = trained.unseen | {name: logits.unseen for name, logits in zip(names, teacher, strict=False)}
    counted = ", ".join(f"{count} of {name}" for name, count in unseen.items() if count)
    notes = [f"words without a token: {counted}; not learnt, they go on with the entity before"] if counted else []
    return record.model_copy(
        update={
            "history": outcome.history,
            "train_seconds": outcome.train_seconds,
            "evaluation_seconds": outcome.evaluation_seconds,
            "examples_per_second": outcome.examples_per_second,
            "best_epoch": outcome.best_epoch,
            "trainable_parameters": parameters.trainable,
            "adapter_parameters": parameters.adapter,
            "head_parameters": parameters.head,
            "truncated": trained.truncated | by_teacher,
            "notes": [*record.notes, *notes],
        }
    )


def finish(record: RunRecord, layout: ExperimentLayout, kept: Iterable[Path], notes: Sequence[str] = ()) -> RunRecord:
    ended = {"status": "finished", "finished": now(), "files": hash_files(layout.root, kept)}
    return record.model_copy(update=ended | {"notes": [*record.notes, *notes]})


def keep_weights(
    config: Config, layout: ExperimentLayout, trained: Trained, arm: Arm, seed: int
) -> tuple[Encoder, list[Path]]:
    """Merge the adapter; keep what others need, the teacher, every adapter, every fully tuned student, and name it."""
    encoder, kept = trained.encoder, weight_folders(config, layout, arm, seed)
    refuse_loss(*kept)
    whole = iter(kept)
    if arm in LORA_ARMS:
        trained.model.to("cpu")  # where it is merged again to ship: the same bits, and no second copy on a GPU
        with atomic_folder(next(whole)) as folder:
            save_adapter(trained.model, folder)
        encoder = dataclasses.replace(encoder, model=merge_student(trained.model))
    for place in whole:
        with atomic_folder(place) as folder:
            save_encoder(encoder, folder)
    return encoder, kept


def weight_folders(config: Config, layout: ExperimentLayout, arm: Arm, seed: int) -> list[Path]:
    """Name the folders that a training leaves its weights in: that of an adapter first, then that of a whole model."""
    place, folders = layout.run(arm, seed), list[Path]()
    if arm in LORA_ARMS:
        folders.append(place.adapter)
    if (arm, seed) == (config.teacher_arm, config.teacher_seed):
        folders.append(layout.teacher)
    elif arm == "student-fft" or arm == "kd-fft":
        folders.append(place.model)
    return folders


def ship_student(config: Config, layout: ExperimentLayout, task: Task, choice: Choice) -> None:
    """Put the chosen run's merged model into `student/`, its adapter into `adapter/`, and the choice beside them."""
    prepare_process(config)
    refuse_loss(layout.student, layout.adapter, layout.onnx)
    arm, seed, place = cast("Arm", choice.arm), choice.seed, layout.run(choice.arm, choice.seed)
    remove(layout.deployed)
    remove(layout.shipped)
    remove(layout.onnx)  # of what was shipped before
    with atomic_folder(layout.student) as folder:
        if arm in LORA_ARMS:
            encoder, trained = load_base(config, arm, seed, task), read_record(place.record)
            if trained.fingerprints.get("base") not in (None, hash_base(encoder)):
                raise ArtifactError(
                    f"{trained.model}, on which {arm} with seed {seed} was trained, changed since, so its student "
                    f"cannot be put together; put back what was there, or delete {place.root} to train it again"
                )
            merged = merge_student(load_adapter(encoder, place.adapter))
            limit = min(closed(settings_for(config, arm)).max_length, encoder.tokenizer.model_max_length)
            merged.config.update({"kdlora_task": task.to_dict(), "kdlora_max_length": limit})  # as after its training
            save_encoder(dataclasses.replace(encoder, model=merged), folder)
        else:
            shutil.copytree(place.model, folder, dirs_exist_ok=True)
    if arm in LORA_ARMS:
        with atomic_folder(layout.adapter) as folder:
            shutil.copytree(place.adapter, folder, dirs_exist_ok=True)
            if config.student.from_teacher_layers is not None:  # a base that lies nowhere else
                add_base(folder, load_base(config, arm, seed, task), address=layout.adapter)
    elif layout.adapter.exists():  # of another arm, shipped before
        remove(layout.adapter)
    write_card(config, layout, choice)
    # Last: once it is there, nothing is shipped again.
    write_json_atomic(layout.shipped, {**choice.model_dump(mode="json"), "files": _shipped_files(layout)})


def model_files(*folders: Path) -> list[Path]:
    """List what shipped models consist of: neither the card, nor what people put beside them."""
    files = (file for folder in folders for file in folder.glob("*") if is_model_file(file))
    return [file for file in files if file.name not in ("README.md", "LICENSE", "NOTICE")]


_BESIDE = re.compile(
    rf"README\.md|{re.escape(MEASURED)}|chat_template\.jinja|adapter_(config\.json|model\.safetensors)|base|logits.*"
)
"""What else we put into a folder of weights."""
_LITTER = (".DS_Store", "._", "Thumbs.db", "desktop.ini")
"""What file managers leave in a folder that somebody has looked at."""


def refuse_loss(*folders: Path) -> None:
    """Refuse to replace folders of weights in which something lies that was put there by hand."""
    own = set(model_files(*folders))
    for entry in (entry for folder in folders for entry in folder.glob("*")):
        ours = entry in own or _BESIDE.fullmatch(entry.name) or is_ours_by_name(entry)
        if not ours and not entry.name.startswith(_LITTER):
            raise ArtifactError(
                f"{entry} is no file of a model, and would be lost where {entry.parent} is made anew; move it away, "
                "and run the same command again"
            )


def shipped_record(layout: ExperimentLayout) -> RunRecord | None:
    """Read the record of the run that ships, if one does."""
    choice = read_choice(layout.shipped)
    return None if choice is None else read_record(layout.run(choice.arm, choice.seed).record)


def write_card(config: Config, layout: ExperimentLayout, choice: Choice | None = None) -> None:
    """Write the card of what ships, anew where something in it has changed."""
    choice = choice or read_choice(layout.shipped)
    if choice is None:
        return
    base = config.student if config.student.model is not None else config.teacher
    tokenizer = _read(layout.student / "tokenizer.json").get("model", {})
    record = read_record(layout.run(choice.arm, choice.seed).record)
    card = student_card(
        record,
        None if base.model is None else read_licence(base.model, base.revision),
        reason=choice.sentence,
        decisions=decision_sentences(layout, record),
        joins_words=bool(tokenizer.get("continuing_subword_prefix")),
    )
    write_text_atomic(layout.student / "README.md", card)


def forget_decisions(config: Config, layout: ExperimentLayout) -> list[str]:
    """Remove thresholds and promise, of files that are gone or of another config; name what is not decided anew."""
    asked = {layout.thresholds: config.export.thresholds, layout.deferral: config.defer.error}
    gone = [place.stem for place, one in asked.items() if one is None and place.exists()]
    for place in (*asked, layout.decided, layout.student / DECISIONS, layout.onnx / DECISIONS):
        remove(place)
    write_card(config, layout)
    return [f"What kdlora {verb} had decided is gone; the verb decides it anew." for verb in gone]


def keep_shipped(config: Config, layout: ExperimentLayout, choice: Choice) -> bool:
    """Say whether `student/` and `adapter/` are what the chosen run makes, and whole; tell today's reasons for it."""
    told = read_choice(layout.shipped)
    if told is None or (told.arm, told.seed, told.made_of) != (choice.arm, choice.seed, choice.made_of):
        return False
    base = layout.adapter.resolve() / "base"  # beside the shipped adapter, which names the place
    settings = _read(layout.adapter / "adapter_config.json")
    at_home = not base.exists() or settings.get("base_model_name_or_path") == str(base)
    if not at_home or not told.files.items() <= _shipped_files(layout).items():
        return False
    if (told.sentence, told.scores) != (choice.sentence, choice.scores):
        write_card(config, layout, choice)
        write_json_atomic(layout.shipped, {**choice.model_dump(mode="json"), "files": told.files})
    return True


def _shipped_files(layout: ExperimentLayout) -> dict[str, str]:
    """Hash what is shipped, but for the card, and for the temperature that calibration puts into the settings."""
    files = hash_files(layout.root, [layout.student, layout.adapter])
    files.pop(f"{layout.student.name}/README.md", None)
    settings = layout.student / "config.json"
    values = {key: value for key, value in _read(settings).items() if key != TEMPERATURE_KEY}
    return files | {settings.relative_to(layout.root).as_posix(): hash_json(values)}


def _read(file: Path) -> dict[str, Any]:
    """Read a file of settings; nothing where it is damaged or missing."""
    try:
        return read_json(file)
    except ArtifactError:
        return {}


def keep_examples(layout: ExperimentLayout, splits: Splits) -> None:
    parts = splits_by_name(splits, scored=True).items()
    names = ("id", "text", "text_pair", "starts", "ends")
    kept = {split: rows.select_columns([name for name in names if name in rows.column_names]) for split, rows in parts}
    write_examples(layout.examples, (ExampleText(split=split, **row) for split, rows in kept.items() for row in rows))
