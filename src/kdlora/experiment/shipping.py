"""What an experiment keeps of a training, and what it ships in the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from kdlora.config import LORA_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.deploy.folder import TEMPERATURE_KEY
from kdlora.evidence.card import student_card
from kdlora.evidence.integrity import hash_files
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
    if (to := _model_place(config, layout, arm, seed)) is not None:
        with atomic_folder(to) as folder:
            save_encoder(encoder, folder)
    return encoder


def kept_places(config: Config, layout: ExperimentLayout, arm: Arm, seed: int) -> list[Path]:
    """Name the files and folders that a run leaves, its record aside.

    Args:
        config: the experiment.
        layout: its folder.
        arm: the arm.
        seed: the run's seed.
    """
    place, model = layout.run(arm, seed), _model_place(config, layout, arm, seed)
    return [place.predictions, *([place.adapter] if arm in LORA_ARMS else []), *([] if model is None else [model])]


def _model_place(config: Config, layout: ExperimentLayout, arm: Arm, seed: int) -> Path | None:
    """Say where a run's whole model goes: the teacher, and those that may ship; the others are not kept."""
    if arm == "fft" and seed == config.teacher_seed:
        return layout.teacher
    return layout.run(arm, seed).model if arm == config.shipped_arm else None


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
    layout.deployed.unlink(missing_ok=True)
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
    """Say whether `student/` and `adapter/` are whole copies of a run's already.

    The card is the student's own, and `config.json` may have got a temperature by calibration.

    Args:
        layout: the experiment folder.
        best: the run that shall be shipped.
    """
    place = layout.run(best.arm, best.seed)
    if not (place.model / WEIGHTS).is_file() or not _same(place.model, layout.student, "config.json", TEMPERATURE_KEY):
        return False
    if not place.adapter.exists():
        return not layout.adapter.exists()
    if best.config["student"]["from_teacher_layers"] is None:
        return _same(place.adapter, layout.adapter)
    base = layout.adapter.resolve() / "base"  # beside the shipped adapter, which names the place
    settings = _read(layout.adapter / "adapter_config.json")
    at_home = settings.get("base_model_name_or_path") == str(base) and (base / WEIGHTS).is_file()
    return at_home and _same(
        place.adapter, layout.adapter, "adapter_config.json", "base_model_name_or_path", "target_modules"
    )


def _same(run: Path, shipped: Path, settings: str | None = None, *keys: str) -> bool:
    """Compare what a run left with its shipped copy, whose card, and some keys of its settings, are its own."""
    own = {"README.md", settings}
    copied = hash_files(shipped, [shipped])
    if any(copied.get(name) != digest for name, digest in hash_files(run, [run]).items() if name not in own):
        return False
    if settings is None:
        return True
    one, other = (_read(folder / settings) for folder in (run, shipped))
    return {k: v for k, v in one.items() if k not in keys} == {k: v for k, v in other.items() if k not in keys}


def _read(file: Path) -> dict[str, Any]:
    """Read a file of settings; nothing where it is damaged or missing."""
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found


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
