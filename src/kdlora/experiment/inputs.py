"""The models and tables that a config names, loaded and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config
from kdlora.data.collection import is_collection, open_collection
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import hash_model
from kdlora.distil.logits import TeacherLogits, read_collection
from kdlora.distil.tables import read_teacher_table
from kdlora.distil.teacher import read_stored_logits
from kdlora.distil.tracking import check_trackers
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.records import ExperimentLayout
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder, load_fine_tuned, student_from_layers


def check_models(config: Config, task: Task) -> None:
    """Load every model that the experiment names, and look for its trackers: a mistake shows before any training."""
    for _ in loaded_models(config, task):
        pass


def loaded_models(config: Config, task: Task) -> Iterator[tuple[Literal["teacher", "student"], Encoder]]:
    """Give every model that the experiment names, one after the other, and check that its adapters fit."""
    check_trackers(config.run.report_to)
    if config.teacher.fine_tuned is not None:
        yield "teacher", load_teacher(config, task)[0]
    for arm in _one_arm_per_base(config):
        encoder = load_base(config, arm, 0, task)
        yield "teacher" if arm in TEACHER_ARMS else "student", encoder
        if arm in LORA_ARMS:
            add_adapter(encoder, config.lora, seed=0)


def check_table(config: Config, splits: Splits) -> list[str]:
    """Check that a table of teacher outputs covers the training rows."""
    collection = _collection(config)
    if collection is not None and config.data.augment:
        raise ConfigError(
            "data.augment makes new texts, which the labelled collection in data.unlabelled has no answers for; set "
            "data.augment to 0, or data.unlabelled to the files that were labelled"
        )
    if collection is not None and not config.given_teacher:
        raise ConfigError(
            f"data.unlabelled is a collection that {open_collection(collection).model} labelled, but this experiment "
            "trains a teacher of its own, and one teacher teaches all rows. Set teacher.fine_tuned to that model, or "
            "data.unlabelled to the files that were labelled"
        )
    if not config.teacher.is_table:
        return []
    tables = [(read_table(config, splits.task, "train"), splits.train, "training")]
    if splits.unlabelled is not None:
        logits = stored_unlabelled_logits(config, None, splits)
        assert logits is not None  # there are unlabelled rows
        tables.append((logits, splits.unlabelled, "unlabelled"))
    return [
        f"{table.source}: {extra} rows belong to no {name} example and are not used."
        for table, rows, name in tables
        if (extra := table.count_extra(rows))
    ]


def _one_arm_per_base(config: Config) -> list[Arm]:
    """Pick an arm for each base model that will be trained, one with adapters where there is one."""
    trained = [arm for arm in config.run.arms if arm != "words" and (arm != "fft" or not config.given_teacher)]
    if set(trained) & DISTILLED_ARMS and not config.given_teacher:
        trained.append("fft")
    bases = ([arm for arm in trained if arm in TEACHER_ARMS], [arm for arm in trained if arm not in TEACHER_ARMS])
    return [next((arm for arm in base if arm in LORA_ARMS), base[0]) for base in bases if base]


def load_base(config: Config, arm: Arm, seed: int, task: Task) -> Encoder:
    """Load the pretrained encoder that an arm trains, with a fresh head."""
    teacher, student = config.teacher, config.student
    if arm in TEACHER_ARMS:
        source, revision, trust = teacher.model, teacher.revision, teacher.trust_remote_code
    elif student.from_teacher_layers is not None:
        assert teacher.model is not None  # the config refuses layers without a teacher model
        return student_from_layers(
            teacher.model,
            student.from_teacher_layers,
            task,
            seed=seed,
            revision=teacher.revision,
            trust_remote_code=teacher.trust_remote_code,
        )
    else:
        source, revision, trust = student.model, student.revision, student.trust_remote_code
    assert source is not None  # the config refuses arms without their model
    return load_encoder(source, task, seed=seed, revision=revision, trust_remote_code=trust)


def load_teacher(config: Config, task: Task, trained: Path | None = None) -> tuple[Encoder, list[int]]:
    """Load the teacher that was given, or else the one that was trained here."""
    teacher = config.teacher
    if teacher.fine_tuned is None:
        return load_fine_tuned(str(trained), task)
    return load_fine_tuned(
        teacher.fine_tuned,
        task,
        label_names=teacher.label_names,
        revision=teacher.revision,
        trust_remote_code=teacher.trust_remote_code,
    )


def stored_logits(config: Config, layout: ExperimentLayout, task: Task) -> TeacherLogits:
    """Read the teacher logits of the training rows: the user's table, or those stored by `label_training_rows`."""
    if config.teacher.is_table:
        return read_table(config, task, "train")
    return read_stored_logits(layout.teacher_logits, task)


def stored_unlabelled_logits(config: Config, layout: ExperimentLayout | None, splits: Splits) -> TeacherLogits | None:
    """Read the teacher logits of the unlabelled rows: the collection's, the user's table, or those stored here."""
    if splits.unlabelled is None:
        return None
    collection = _collection(config)
    if collection is not None:
        return read_collection(collection, splits.task, "data.unlabelled")
    if config.teacher.is_table:
        return read_table(config, splits.task, "unlabelled")
    assert layout is not None  # a model's logits are stored in the experiment's folder
    return read_stored_logits(layout.unlabelled_logits, splits.task)


def labels_unlabelled(config: Config) -> bool:
    """Say whether the teacher of the experiment has to read the unlabelled rows."""
    more = config.data.unlabelled is not None or config.data.augment > 0
    return more and _collection(config) is None and not config.teacher.is_table


def check_collection(config: Config, encoder: Encoder) -> None:
    """Refuse unlabelled rows that another teacher than this one has labelled."""
    folder = _collection(config)
    if folder is None:
        return
    collection = open_collection(folder)
    if collection.weights != hash_model(encoder.model):
        raise ArtifactError(
            f"{folder} (data.unlabelled) was labelled with other weights ({collection.model}) than those of the "
            f"teacher {encoder.source}; one teacher teaches all rows. Label it with this teacher, or name the text "
            "files in data.unlabelled"
        )


def _collection(config: Config) -> Path | None:
    """Return the labelled collection that `data.unlabelled` names, if it is one."""
    place = None if config.data.unlabelled is None else Path(config.data.unlabelled)
    return place if place is not None and is_collection(place) else None


def read_table(config: Config, task: Task, split: str) -> TeacherLogits:
    """Read the rows of one split from the table that is the teacher."""
    teacher = config.teacher
    if teacher.logits is not None:
        return read_teacher_table(teacher.logits, task, values="logits", split=split)
    assert teacher.probabilities is not None
    return read_teacher_table(teacher.probabilities, task, values="probabilities", split=split)
