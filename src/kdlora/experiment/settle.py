"""Loads and checks what a config names; what it leaves open is settled by data and models: lengths, steps, rates."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from pydantic import BaseModel

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config, SettledTraining, TrainConfig
from kdlora.configfile import load_config
from kdlora.data.batches import PAD_MULTIPLE, count_tokens, tokenise
from kdlora.data.load import Splits
from kdlora.data.logit_table import is_collection, open_collection
from kdlora.data.spool import label_array, read_column, read_texts
from kdlora.data.tasks import Task, named_weights, window_settings
from kdlora.data.windows import tokens_read
from kdlora.defaults import STEPS_A_LABEL, STEPS_A_TYPE, adapter_rate, epochs_for, full_rate
from kdlora.distil.inference import hash_model, predict_logits, read_stored_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.precision import resolve_device, resolve_precision
from kdlora.distil.processes import current_processes
from kdlora.distil.teacher_table import doubts_of_logits, read_collection, read_teacher_table, refuse_other_texts
from kdlora.distil.tracking import check_trackers
from kdlora.distil.words import Texts
from kdlora.errors import ArtifactError, ConfigError, ModelError
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder, load_fine_tuned, student_from_layers
from kdlora.models.loading import is_decoder
from kdlora.system.environment import default_threads

logger = logging.getLogger(__name__)

OPEN = ("max_length", "epochs", "learning_rate")
"""Keys of a training that may be null until data and models are known."""
HELD = 0.99
"""Share of the training texts that the chosen length holds whole."""
LEAST = 16
MOST_TEXTS = 5_000
"""So many texts are looked at, spread evenly over the training rows."""
_TIMED_SECONDS = 0.2
_GAIN = 0.85
"""With n threads a pass is so many times faster: n to the power of this."""

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = get_args(Role)
SETTLED = (
    *("task.metric", "data.augment", "teacher.adapter_learning_rate", "student.full_learning_rate"),
    *(f"{role}.train.{key}" for role in ROLES for key in (*OPEN, "class_weights", "select")),
)
"""Keys whose value an experiment chooses where the config leaves them open."""
Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class ModelLook:
    """What a child found of one model."""

    lengths: np.ndarray  # tokens of each sampled text, uncut
    limit: int  # most tokens that it takes
    width: int  # hidden size
    seconds: float = 0.0  # of a forward pass, a token; 0 where it was not timed
    unknown: float = 0.0  # share of the tokens that stand for what the tokenizer cannot read, 0 to 1
    decodes: bool = False  # a decoder, which is not exported


Looks = Mapping[Role, ModelLook]


def look_at_models(config: Config, task: Task, texts: Texts, *, timed: bool = True) -> Looks:
    """Load each model that the experiment names, count tokens and time it, in a child; check adapters and weights."""
    check_trackers(config.run.report_to)
    for train in (config.teacher.train, config.student.train):
        named_weights(task, train.class_weights)
    found: dict[Role, ModelLook] = {}

    def look_at(role: Role, encoder: Encoder) -> None:
        lengths, unknown = count_tokens(texts, encoder.tokenizer)
        limit = encoder.tokenizer.model_max_length
        wanted = getattr(config, role).train.max_length or choose_max_length([lengths], [limit])
        seconds = _time_a_token(config, encoder, texts, lengths, wanted) if timed else 0.0
        found[role] = ModelLook(lengths, limit, encoder.width, seconds, unknown, is_decoder(encoder.model.config))

    if config.teacher.fine_tuned is not None:
        look_at("teacher", load_teacher(config, task)[0])
    trained = set[Arm](config.run.arms) - {"words", *(["fft"] if config.given_teacher else [])}
    if trained & DISTILLED_ARMS and not config.given_teacher:
        trained.add(config.teacher_arm)
    for role in ROLES:
        if not (own := trained & TEACHER_ARMS if role == "teacher" else trained - TEACHER_ARMS):
            continue
        encoder = load_base(config, min(own), 0, task)
        known = type(encoder.model).__module__.startswith("transformers.")
        if role == "student" and not (known and encoder.tokenizer.is_fast):
            code = type(encoder.tokenizer if known else encoder.model).__name__
            raise ModelError(
                f"{encoder.source} (student.model): its {code} is Python code, so what is trained of it could neither "
                "be exported nor predict; choose a student with a tokenizer.json, and of a class that transformers has "
                "(perhaps this one, without trust_remote_code). As a teacher it may stay"
            )
        if role not in found:  # else the base of `lora` beside a teacher that was given
            look_at(role, encoder)
        if own & LORA_ARMS:
            add_adapter(encoder, config.lora, seed=0)
    return found


def load_base(config: Config, arm: Arm, seed: int, task: Task) -> Encoder:
    layers = None if arm in TEACHER_ARMS else config.student.from_teacher_layers
    named = config.teacher if arm in TEACHER_ARMS or layers is not None else config.student
    assert named.model is not None  # the config refuses arms, and layers, without their model
    trust = named.trust_remote_code
    encoder = load_encoder(named.model, task, seed=seed, revision=named.revision, trust_remote_code=trust)
    return encoder if layers is None else student_from_layers(encoder, layers)


def load_teacher(config: Config, task: Task, trained: Path | None = None) -> tuple[Encoder, list[int]]:
    teacher, given = config.teacher, config.teacher.fine_tuned is not None
    return load_fine_tuned(
        str(teacher.fine_tuned if given else trained),
        task,
        label_names=teacher.label_names,  # of `fine_tuned` alone; the revision may be of `model`
        revision=teacher.revision if given else None,
        trust_remote_code=teacher.trust_remote_code,
    )


def stored_logits(config: Config, layout: ExperimentLayout | None, splits: Splits) -> list[TeacherLogits]:
    """Read the teacher logits of training and unlabelled rows, from the user's table, a collection, or our own."""
    found = []
    for split, rows in (("train", splits.train), ("unlabelled", splits.unlabelled)):
        if rows is None:
            continue
        if split == "unlabelled" and (collection := _collection(config.data.unlabelled)) is not None:
            found.append(read_collection(collection, splits.task, "data.unlabelled"))
        elif config.teacher.is_table:
            found.append(read_table(config, splits.task, split))
        else:
            assert layout is not None  # a model's logits are stored in the experiment's folder
            folder = layout.teacher_logits if split == "train" else layout.unlabelled_logits
            found.append(read_stored_logits(folder, splits.task))
    return found


def read_table(config: Config, task: Task, split: str) -> TeacherLogits:
    logits, probabilities = config.teacher.logits, config.teacher.probabilities
    values: Literal["logits", "probabilities"] = "probabilities" if logits is None else "logits"
    return read_teacher_table(str(logits or probabilities), task, values=values, split=split)


def check_table(config: Config, splits: Splits) -> Splits:
    """Check that a table of teacher outputs, or a labelled collection, fits the experiment; note what is odd in it."""
    if not set(config.run.arms) & DISTILLED_ARMS:
        return splits  # it teaches nobody
    collection, table = _collection(config.data.unlabelled), _collection(config.teacher.logits)
    if collection is not None and config.data.augment:
        raise ConfigError(
            "data.augment makes new texts, which the labelled collection in data.unlabelled has no answers for; set "
            "data.augment to 0, or data.unlabelled to the files that were labelled"
        )
    weights = [open_collection(one).ingredients.get("weights") for one in (collection, table) if one is not None]
    if collection is not None and config.teacher.fine_tuned is None and weights[1:] != weights[:1]:
        raise ConfigError(
            f"data.unlabelled is a collection that {open_collection(collection).model} labelled, and one teacher "
            "teaches all rows. Set teacher.fine_tuned to that model, teacher.logits to a folder that it labelled, or "
            "data.unlabelled to the files that were labelled"
        )
    if not config.teacher.is_table:
        return splits
    parts = [("training", splits.train)]
    parts += [] if splits.unlabelled is None else [("unlabelled", splits.unlabelled)]
    tables = stored_logits(config, None, splits)
    if table is not None:
        refuse_other_texts(table, splits)
    notes = [
        f"{table.source}: {extra} rows belong to no {name} example and teach nothing."
        for table, (name, rows) in zip(tables, parts, strict=True)
        if (extra := table.count_extra(rows))
    ]
    doubts = doubts_of_logits(tables[0], splits.task)
    if splits.task.kind == "regression":
        said = np.asarray(pc.list_flatten(read_column(tables[0].attach(splits.train), "teacher_logits")))
        doubts = doubts_of_units(said, label_array(splits.train), "training labels")
    for doubt in doubts:
        logger.warning(doubt)
    return replace(splits, notes=(*splits.notes, *notes, *doubts))


def doubts_of_units(said: np.ndarray, labels: np.ndarray, what: str) -> list[str]:
    """Say whether a teacher's values are further from labels than the labels' mean is; correlation sees no units."""
    said, labels = said.astype(np.float64), labels.astype(np.float64)
    if not np.mean((said - labels) ** 2) > labels.var() > 0:
        return []
    return [
        f"The teacher's values (mean {said.mean():.3g}) are further from the {what} (mean {labels.mean():.3g}) than "
        "their mean is. If they are in other units, bring them to those of the labels."
    ]


def labels_unlabelled(config: Config) -> bool:
    more = config.data.unlabelled is not None or config.data.augment != 0
    return more and _collection(config.data.unlabelled) is None and not config.teacher.is_table


def check_collection(config: Config, encoder: Encoder, task: Task) -> None:
    if (folder := _collection(config.data.unlabelled)) is None:
        return
    collection = open_collection(folder)
    if collection.ingredients.get("weights") != hash_model(encoder.model):
        raise ArtifactError(
            f"{folder} (data.unlabelled) was labelled with other weights ({collection.model}) than the teacher's "
            f"({encoder.source}); one teacher teaches all rows. Label it with this teacher, or name the text files"
        )
    if collection.ingredients.get("windows") != task.to_dict().get("windows"):
        raise ArtifactError(
            f"{folder} (data.unlabelled): its long texts were not read as this experiment reads them (data.long_texts, "
            "window_pool, window_stride); name the text files in data.unlabelled"
        )


def _collection(place: str | None) -> Path | None:
    return Path(place) if place is not None and is_collection(Path(place)) else None


def settings_for(config: Config, arm: Arm) -> TrainConfig:
    """Return how an arm is trained: `fft`, and `lora` if it teaches, by `teacher.train`, others by `student.train`."""
    if arm == "fft":
        return config.teacher.train
    train = config.student.train
    if arm == "lora":
        settings = config.teacher.train if config.teacher_arm == "lora" else train
        longest = settings.max_length or config.teacher.train.max_length  # no student was looked at
        rate = config.teacher.adapter_learning_rate or train.learning_rate
        return settings.model_copy(update={"learning_rate": rate, "max_length": longest})
    if arm in LORA_ARMS:
        return train
    head = config.teacher.train.head_learning_rate
    return train.model_copy(update={"learning_rate": config.student.full_learning_rate, "head_learning_rate": head})


def sample_texts(rows: Dataset) -> dict[str, list[str]]:
    if len(rows) > MOST_TEXTS:
        rows = rows.select(np.linspace(0, len(rows) - 1, MOST_TEXTS).astype(int))
    return read_texts(rows)


def choose_max_length(lengths: Iterable[np.ndarray], limits: Iterable[int]) -> int:
    """Choose what holds 99% of the texts for every tokenizer, a multiple of 8, at least 16, within every limit."""
    held = max(float(np.quantile(counts, HELD, method="inverted_cdf")) for counts in lengths)
    return min([max(LEAST, math.ceil(held / PAD_MULTIPLE) * PAD_MULTIPLE), *limits])


def _time_a_token(config: Config, encoder: Encoder, texts: Texts, lengths: np.ndarray, max_length: int) -> float:
    """Time forward passes over texts of about mean length, which pad each other little, as those of a step do."""
    device, windows = resolve_device(config.run.device), window_settings(config.data)
    encoder.model.to(device)
    precision = resolve_precision(config.run.precision, config.run.device)[0]
    read = tokens_read(lengths, max_length, windows)
    usual = np.argsort(np.abs(read - read.mean()), kind="stable")[: len(read) // 2 + 1]
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def seconds_of(rows: np.ndarray) -> float:
        some = {name: [column[row] for row in rows] for name, column in texts.items()}
        words = {"starts": [[0]] * len(rows), "ends": [[1]] * len(rows)} if encoder.reads_words else {}
        tokens = tokenise(Dataset.from_dict(some | words), encoder.tokenizer, max_length, windows=windows, quiet=True)
        start = clock()
        predict_logits(encoder.model, encoder.tokenizer, tokens, precision=precision)
        return clock() - start

    rows, threads = np.resize(usual, 4), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds_of(rows)  # the first pass is slower than all others
        while seconds_of(rows) < _TIMED_SECONDS and len(rows) < 200:
            rows = np.resize(usual, 4 * len(rows))
        took = min(seconds_of(rows) for _ in range(3)) / float(read[rows].sum())  # other work can only lengthen one
        return took / (config.run.threads or min(threads, default_threads())) ** _GAIN if device.type == "cpu" else took
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Chosen:
    """What data and models decide where a config decides nothing."""

    looks: Looks  # of teacher and student, as far as they are models
    rows: Mapping[str, int]  # of each split
    task: Task
    processes: int = 1  # that share a step, each with `batch_size` rows

    def fill_in(self, config: Config, *, follows: bool | None = None) -> Config:
        """Settle what is null or `auto`; teacher and student cut texts alike, in windows each reads what it can.

        `follows` says whether a teacher's adapters have the student's rate; by default where that was set.
        """
        wide, narrow = (self.looks[role].width if role in self.looks else None for role in ROLES)
        longest = choose_max_length([one.lengths for one in self.looks.values()], []) if self.looks else LEAST
        values: dict[str, Any] = {"student.full_learning_rate": narrow and full_rate(narrow)}
        if not (config.student.train.learning_rate is not None if follows is None else follows):
            values["teacher.adapter_learning_rate"] = wide and adapter_rate(wide)
        rates = {"teacher": wide and full_rate(wide), "student": narrow and adapter_rate(narrow)}
        alike = config.data.long_texts == "cut"
        for role in ROLES:
            train = getattr(config, role).train
            rows = self.rows["train"] + (self.rows.get("unlabelled", 0) if role == "student" else 0)
            of_step = train.batch_size * self.processes
            limits = [one.limit for name, one in self.looks.items() if alike or name == role]
            values |= {
                f"{role}.train.max_length": min([longest, *limits]) if role in self.looks else None,
                f"{role}.train.epochs": epochs_for(role, rows, steps_for_labels(self.task, role), of_step),
                f"{role}.train.learning_rate": rates[role],
                f"{role}.train.class_weights": self.task.auto_weights(role),
                f"{role}.train.select": train.selection(self.task.kind),
            }
        return _fill(config, values)


def steps_for_labels(task: Task, role: Role) -> int:
    """Count the steps that the labels take; a type of entity takes more than a class, since few words are of it."""
    if task.kind == "tokens":
        return STEPS_A_TYPE * len(task.label_types)
    longer = 4 if task.kind == "multi-label" else 2 if task.auto_weights(role) else 1
    return STEPS_A_LABEL * task.num_labels * (longer if role == "teacher" else 1)


def rows_per_epoch(splits: Splits, *, unlabelled: bool = True) -> int:
    """Count the rows that an epoch draws, with those held out by a search; copies come beside them."""
    more = 0 if splits.unlabelled is None or not unlabelled else len(splits.unlabelled) - splits.copies
    return len(splits.train) + splits.held_out + more


def settled(
    settings: TrainConfig, encoder: Encoder, splits: Splits, *, adapters: bool, rows: int | None
) -> SettledTraining:
    """Settle the training of one model by its own texts and width, all of it or its adapters alone.

    `rows` are those of a student's epoch; None is a teacher.
    """
    length = settings.max_length
    if length is None:
        lengths, _ = count_tokens(sample_texts(splits.train), encoder.tokenizer)
        length = choose_max_length([lengths], [encoder.tokenizer.model_max_length])
    rate = adapter_rate(encoder.width) if adapters else full_rate(encoder.width)
    role: Role = "teacher" if rows is None else "student"
    steps, of_step = steps_for_labels(splits.task, role), settings.batch_size * current_processes().count
    values = {"max_length": length, "epochs": epochs_for(role, rows or len(splits.train), steps, of_step)}
    return closed(_fill(settings, values | {"learning_rate": rate, "class_weights": splits.task.auto_weights(role)}))


def closed(settings: TrainConfig) -> SettledTraining:
    if null := [key for key in OPEN if getattr(settings, key) is None]:
        raise ConfigError(f"train.{null[0]} is null and no texts were looked at yet; set it, or use run_experiment")
    return SettledTraining(**settings.model_dump())


def with_recorded(config: Config, recorded: Path) -> Config:
    """Settle what an experiment's `config.yaml`, if there is one, has settled: a later call trains as the first did."""
    if not recorded.exists():
        return config
    there = load_config(recorded)
    return _fill(config, {key: attrgetter(key)(there) for key in SETTLED})


def with_metric(config: Config, layout: ExperimentLayout) -> Config:
    """Where no metric is named, name the one that runs were scored by; that of version 0.2 did not ask for the data."""
    for place in sorted(layout.runs.glob("*/run.json")):
        with contextlib.suppress(ArtifactError):
            task = Task.from_dict(read_record(place).task)
            own = task.kind == "single-label" and not task.name
            return _fill(config, {"task.metric": task.metrics[0]}) if own else config
    return config


def _fill(section: Section, values: Mapping[str, Any]) -> Section:
    """Set the keys whose value still says that they are open: null, or `auto`."""
    auto = ("class_weights", "select")
    is_open = {key: attrgetter(key)(section) == ("auto" if key.endswith(auto) else None) for key in values}
    return with_values(section, {key: value for key, value in values.items() if is_open[key]})


def with_values(section: Section, values: Mapping[str, Any]) -> Section:
    """Copy a section with other values of keys such as `train.epochs`, which are not checked anew."""
    update: dict[str, Any] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        update[name] = with_values(update.get(name, getattr(section, name)), {rest: value}) if rest else value
    return section.model_copy(update=update)
