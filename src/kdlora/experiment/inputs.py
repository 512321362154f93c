"""The models and tables that a config names, loaded and checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.logit_table import is_collection, open_collection
from kdlora.data.tasks import Task, find_label, named_weights
from kdlora.distil.inference import hash_model, read_stored_logits
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.teacher_table import read_collection, read_teacher_table
from kdlora.distil.tracking import check_trackers
from kdlora.errors import ArtifactError, ConfigError
from kdlora.evidence.records import ExperimentLayout
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder, load_fine_tuned, student_from_layers

Role = Literal["teacher", "student"]


def loaded_models(config: Config, task: Task) -> Iterator[tuple[Role, Encoder]]:
    """Give every model that the experiment names, one after the other; check its adapters, weights and trackers."""
    check_trackers(config.run.report_to)
    for train in (config.teacher.train, config.student.train):
        named_weights(task, train.class_weights)
    if config.export.min_recall and task.kind != "tokens":
        raise ConfigError("export.min_recall: only a task of tokens has types of entities; leave it out")
    for name in config.export.min_recall:
        find_label(name, task.label_types, "export.min_recall")
    if config.teacher.fine_tuned is not None:
        yield "teacher", load_teacher(config, task)[0]
    trained: list[Arm] = [
        arm for arm in config.run.arms if arm != "words" and (arm != "fft" or not config.given_teacher)
    ]
    if set(trained) & DISTILLED_ARMS and not config.given_teacher:
        trained.append(config.teacher_arm)
    roles: tuple[Role, ...] = ("teacher", "student")
    for role in roles:
        arms = [arm for arm in trained if (arm in TEACHER_ARMS) == (role == "teacher")]
        if arms:
            arm = next((arm for arm in arms if arm in LORA_ARMS), arms[0])
            encoder = load_base(config, arm, 0, task)
            yield role, encoder
            if arm in LORA_ARMS:
                add_adapter(encoder, config.lora, seed=0)


def load_base(config: Config, arm: Arm, seed: int, task: Task) -> Encoder:
    """Load the pretrained encoder that an arm trains, with a fresh head."""
    teacher, layers = config.teacher, config.student.from_teacher_layers
    if arm not in TEACHER_ARMS and layers is not None:
        assert teacher.model is not None  # the config refuses layers without a teacher model
        trust, revision = teacher.trust_remote_code, teacher.revision
        return student_from_layers(teacher.model, layers, task, seed=seed, revision=revision, trust_remote_code=trust)
    named = teacher if arm in TEACHER_ARMS else config.student
    assert named.model is not None  # the config refuses arms without their model
    trust = named.trust_remote_code
    return load_encoder(named.model, task, seed=seed, revision=named.revision, trust_remote_code=trust)


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


def stored_logits(config: Config, layout: ExperimentLayout | None, splits: Splits) -> list[TeacherLogits]:
    """Read the teacher logits of training and unlabelled rows, from the user's table, a collection, or our own."""
    found = []
    for split, rows in (("train", splits.train), ("unlabelled", splits.unlabelled)):
        collection = _collection(config) if split == "unlabelled" else None
        if rows is None:
            continue
        if collection is not None:
            found.append(read_collection(collection, splits.task, "data.unlabelled"))
        elif config.teacher.is_table:
            found.append(read_table(config, splits.task, split))
        else:
            assert layout is not None  # a model's logits are stored in the experiment's folder
            folder = layout.teacher_logits if split == "train" else layout.unlabelled_logits
            found.append(read_stored_logits(folder, splits.task))
    return found


def read_table(config: Config, task: Task, split: str) -> TeacherLogits:
    teacher = config.teacher
    if teacher.logits is not None:
        return read_teacher_table(teacher.logits, task, values="logits", split=split)
    assert teacher.probabilities is not None
    return read_teacher_table(teacher.probabilities, task, values="probabilities", split=split)


def check_table(config: Config, splits: Splits) -> list[str]:
    """Check that a table of teacher outputs, or a labelled collection, fits the experiment and covers its rows."""
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
    parts = [("training", splits.train)]
    parts += [] if splits.unlabelled is None else [("unlabelled", splits.unlabelled)]
    return [
        f"{table.source}: {extra} rows belong to no {name} example and are not used."
        for table, (name, rows) in zip(stored_logits(config, None, splits), parts, strict=True)
        if (extra := table.count_extra(rows))
    ]


def labels_unlabelled(config: Config) -> bool:
    """Say whether the teacher of the experiment has to read the unlabelled rows."""
    more = config.data.unlabelled is not None or config.data.augment > 0
    return more and _collection(config) is None and not config.teacher.is_table


def check_collection(config: Config, encoder: Encoder) -> None:
    folder = _collection(config)
    if folder is None:
        return
    collection = open_collection(folder)
    if collection.ingredients.get("weights") != hash_model(encoder.model):
        raise ArtifactError(
            f"{folder} (data.unlabelled) was labelled with other weights ({collection.model}) than those of the "
            f"teacher {encoder.source}; one teacher teaches all rows. Label it with this teacher, or name the text "
            "files in data.unlabelled"
        )


def _collection(config: Config) -> Path | None:
    """Return the labelled collection that `data.unlabelled` names, if it is one."""
    place = None if config.data.unlabelled is None else Path(config.data.unlabelled)
    return place if place is not None and is_collection(place) else None
