"""What an experiment keeps of a training, and what it ships in the end."""

from __future__ import annotations

import dataclasses
import shutil

from kdlora.config import LORA_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.distil.fingerprints import hash_file
from kdlora.evidence.card import student_card
from kdlora.evidence.records import ExampleText, ExperimentLayout, RunRecord, atomic_folder, write_examples
from kdlora.experiment.arms import Trained
from kdlora.experiment.recording import prepare_process, splits_by_name
from kdlora.experiment.sources import load_base
from kdlora.models.adapters import add_base, merge_student, save_adapter
from kdlora.models.encoders import Encoder, save_encoder
from kdlora.models.licence import read_licence

WEIGHTS = "model.safetensors"


def keep_weights(
    config: Config, layout: ExperimentLayout, task: Task, trained: Trained, arm: Arm, seed: int
) -> Encoder:
    """Merge the adapter, and keep what others need: the teacher, every adapter, and the models that may ship.

    Args:
        config: the experiment.
        layout: its folder.
        task: goes into the model's config, so that a shipped folder knows its columns.
        trained: what the training left.
        arm: the arm.
        seed: the run's seed.

    Returns:
        The plain model, as it would be shipped.
    """
    place, encoder = layout.run(arm, seed), trained.encoder
    if arm in LORA_ARMS:
        with atomic_folder(place.adapter) as folder:
            save_adapter(trained.model, folder)
        encoder = dataclasses.replace(encoder, model=merge_student(trained.model))
    encoder.model.config.kdlora_task = task.to_dict()
    is_teacher = arm == "fft" and seed == config.teacher_seed
    if is_teacher or arm == config.shipped_arm:
        with atomic_folder(layout.teacher if is_teacher else place.model) as folder:
            save_encoder(encoder, folder)
    return encoder


def ship_student(config: Config, layout: ExperimentLayout, task: Task, best: RunRecord) -> None:
    """Copy the chosen run's merged model to `student/` and its adapter to `adapter/`.

    Args:
        config: the experiment.
        layout: its folder.
        task: labels and kind.
        best: the run that was best on validation.
    """
    prepare_process(config)
    place = layout.run(best.arm, best.seed)
    if place.adapter.exists():
        with atomic_folder(layout.adapter) as folder:
            shutil.copytree(place.adapter, folder, dirs_exist_ok=True)
            if config.student.from_teacher_layers is not None:  # a base that lies nowhere else
                add_base(folder, load_base(config, "student-lora", best.seed, task), address=layout.adapter)
    elif layout.adapter.exists():  # of another arm, shipped before
        shutil.rmtree(layout.adapter)
    with atomic_folder(layout.student) as folder:  # last: once it is there, nothing is shipped again
        shutil.copytree(place.model, folder, dirs_exist_ok=True)
        base = config.student if config.student.model is not None else config.teacher
        licence = None if base.model is None else read_licence(base.model, base.revision)
        (folder / "README.md").write_text(student_card(best, licence), encoding="utf-8")


def is_shipped(layout: ExperimentLayout, best: RunRecord) -> bool:
    """Say whether `student/` holds the weights of a run already.

    Args:
        layout: the experiment folder.
        best: the run that shall be shipped.
    """
    run, student = layout.run(best.arm, best.seed).model / WEIGHTS, layout.student / WEIGHTS
    return run.exists() and student.exists() and hash_file(run) == hash_file(student)


def keep_examples(layout: ExperimentLayout, splits: Splits) -> None:
    """Keep the texts of the scored rows, so that the report can quote them.

    Args:
        layout: the experiment folder.
        splits: the task with its examples.
    """
    write_examples(
        layout.examples,
        (
            ExampleText(row["id"], split, row["text"], row.get("text_pair"))
            for split, rows in splits_by_name(splits, scored=True).items()
            for row in rows
        ),
    )
