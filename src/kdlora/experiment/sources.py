"""The models and tables that a config names, loaded and checked."""

from __future__ import annotations

from pathlib import Path

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.distil.logits import TeacherLogits
from kdlora.distil.tables import read_teacher_table
from kdlora.distil.teacher import read_stored_logits
from kdlora.evidence.records import ExperimentLayout
from kdlora.models.adapters import add_adapter
from kdlora.models.encoders import Encoder, load_encoder, load_fine_tuned, student_from_layers


def check_models(config: Config, task: Task) -> None:
    """Load every model that the experiment names, so that a mistake shows before any training.

    Args:
        config: the experiment.
        task: its task.

    Raises:
        ModelError: for a model, label space or adapter target that does not fit.
    """
    if config.teacher.fine_tuned is not None:
        load_teacher(config, task)
    for arm in _one_arm_per_base(config):
        encoder = load_base(config, arm, 0, task)
        if arm in LORA_ARMS:
            add_adapter(encoder, config.lora, seed=0)


def check_table(config: Config, splits: Splits) -> list[str]:
    """Check that a table of teacher outputs covers the training rows.

    Args:
        config: the experiment.
        splits: the task with its examples.

    Returns:
        A plain sentence on the table's rows that belong to no example; nothing where the teacher is a model.

    Raises:
        DataError: for a table that does not fit.
    """
    if not config.teacher.is_table:
        return []
    table = read_table(config, splits.task, "train")
    extra = table.count_extra(splits.train)
    return [f"{table.source}: {extra} rows belong to no training example and are not used."] if extra else []


def _one_arm_per_base(config: Config) -> list[Arm]:
    """Pick an arm for each base model that will be trained, one with adapters where there is one."""
    trained = [arm for arm in config.run.arms if arm != "fft" or not config.given_teacher]
    if set(trained) & DISTILLED_ARMS and not config.given_teacher:
        trained.append("fft")
    bases = ([arm for arm in trained if arm in TEACHER_ARMS], [arm for arm in trained if arm not in TEACHER_ARMS])
    return [next((arm for arm in base if arm in LORA_ARMS), base[0]) for base in bases if base]


def load_base(config: Config, arm: Arm, seed: int, task: Task) -> Encoder:
    """Load the pretrained encoder that an arm trains, with a fresh head.

    Args:
        config: the experiment.
        arm: the arm.
        seed: seeds the head, alike in all arms.
        task: labels and kind.
    """
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
    """Load the teacher that was given, or else the one that was trained here.

    Args:
        config: the experiment.
        task: labels and kind.
        trained: folder of the teacher that was trained here.

    Returns:
        The teacher, and for each label of the task the column of the teacher's output.
    """
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
    """Read the teacher logits of the training rows: the user's table, or those stored by `label_training_rows`.

    Args:
        config: the experiment.
        layout: its folder.
        task: labels and kind.
    """
    if config.teacher.is_table:
        return read_table(config, task, "train")
    return read_stored_logits(layout.teacher_logits, task)


def read_table(config: Config, task: Task, split: str) -> TeacherLogits:
    """Read the rows of one split from the table that is the teacher.

    Args:
        config: the experiment; its teacher is a table.
        task: whose labels the table's columns are matched with, by name.
        split: `train`, `validation` or `test`.

    Raises:
        DataError: if the table does not fit, or has no rows of this split.
    """
    teacher = config.teacher
    if teacher.logits is not None:
        return read_teacher_table(teacher.logits, task, values="logits", split=split)
    assert teacher.probabilities is not None
    return read_teacher_table(teacher.probabilities, task, values="probabilities", split=split)
