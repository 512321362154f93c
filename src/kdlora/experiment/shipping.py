"""What an experiment keeps of a training, and what it ships in the end."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any, cast

from kdlora.config import LORA_ARMS, STUDENT_ARMS, Arm, Config
from kdlora.data.load import Splits
from kdlora.data.tasks import Task
from kdlora.deploy.folder import DECISIONS, TEMPERATURE_KEY
from kdlora.distil.train import Trained
from kdlora.errors import ArtifactError
from kdlora.evidence.predictions import ExampleText, write_examples
from kdlora.evidence.records import ExperimentLayout, RunLayout, RunRecord, read_record
from kdlora.experiment.inputs import load_base
from kdlora.experiment.recording import hash_base, prepare_process, splits_by_name
from kdlora.experiment.settle import cut_at, settings_for
from kdlora.foreign import read_json
from kdlora.models.adapters import MUTATING, add_base, load_adapter, merge_student, save_adapter
from kdlora.models.encoders import Encoder, save_encoder
from kdlora.models.settings import read_licence
from kdlora.report.card import student_card
from kdlora.report.deferred import decision_sentences
from kdlora.report.findings import Choice, read_choice
from kdlora.system.integrity import hash_files, hash_json
from kdlora.system.ownership import remove
from kdlora.system.storage import atomic_folder, write_json_atomic


def keep_weights(
    config: Config, layout: ExperimentLayout, task: Task, trained: Trained, arm: Arm, seed: int
) -> tuple[Encoder, list[Path]]:
    """Merge the adapter; keep what others need, the teacher, every adapter, every fully tuned student, and name it."""
    place, encoder, kept = layout.run(arm, seed), trained.encoder, list[Path]()
    if arm in LORA_ARMS:
        kept.append(place.adapter)
        with atomic_folder(place.adapter) as folder:
            save_adapter(trained.model, folder)
        if config.lora.init in MUTATING:  # the saved adapter is rounded otherwise than the trained one
            encoder = _merged(config, place, task, arm, seed)[0]
        else:
            encoder = dataclasses.replace(encoder, model=merge_student(trained.model))
    _describe(encoder, config, task, arm)
    if (arm, seed) == (config.teacher_arm, config.teacher_seed):
        kept.append(layout.teacher)
    elif arm == "student-fft" or arm == "kd-fft":
        kept.append(place.model)
    else:
        return encoder, kept
    with atomic_folder(kept[-1]) as folder:
        save_encoder(encoder, folder)
    return encoder, kept


def lacks_weights(layout: ExperimentLayout, arm: Arm, seed: int) -> bool:
    """Say whether a run that may ship has lost, or never kept, its weights."""
    place = layout.run(arm, seed)
    return arm in STUDENT_ARMS and not (place.adapter if arm in LORA_ARMS else place.model).exists()


def _merged(config: Config, place: RunLayout, task: Task, arm: Arm, seed: int) -> tuple[Encoder, str]:
    """Make a run's merged model from base and adapter, as it was when it was scored, and fingerprint the base."""
    encoder = load_base(config, arm, seed, task)
    base = hash_base(encoder)
    merged = dataclasses.replace(encoder, model=merge_student(load_adapter(encoder, place.adapter)))
    _describe(merged, config, task, arm)
    return merged, base


def _describe(encoder: Encoder, config: Config, task: Task, arm: Arm) -> None:
    """Note in a model's own config what it was trained on, and where it cut the texts: prediction does alike."""
    encoder.model.config.kdlora_task = task.to_dict()
    limit = min(cut_at(settings_for(config, arm)), encoder.tokenizer.model_max_length)
    encoder.model.config.kdlora_max_length = limit


def ship_student(config: Config, layout: ExperimentLayout, task: Task, best: RunRecord, choice: Choice) -> None:
    """Put the chosen run's merged model into `student/`, its adapter into `adapter/`, and the choice beside them."""
    prepare_process(config)
    place = layout.run(best.arm, best.seed)
    remove(layout.deployed)
    remove(layout.shipped)
    arm = cast("Arm", best.arm)
    with atomic_folder(layout.student) as folder:
        if arm in LORA_ARMS:
            encoder, base = _merged(config, place, task, arm, best.seed)
            if base != best.fingerprints.get("base", base):
                raise ArtifactError(
                    f"{best.model}, on which {best.arm} with seed {best.seed} was trained, changed since, so its "
                    f"student cannot be put together; put back what was there, or delete {place.root} to train it again"
                )
            save_encoder(encoder, folder)
        else:
            shutil.copytree(place.model, folder, dirs_exist_ok=True)
        _write_card(config, layout, best, choice, folder)
    if arm in LORA_ARMS:
        with atomic_folder(layout.adapter) as folder:
            shutil.copytree(place.adapter, folder, dirs_exist_ok=True)
            if config.student.from_teacher_layers is not None:  # a base that lies nowhere else
                add_base(folder, load_base(config, arm, best.seed, task), address=layout.adapter)
    elif layout.adapter.exists():  # of another arm, shipped before
        remove(layout.adapter)
    # Last: once it is there, nothing is shipped again.
    write_json_atomic(layout.shipped, {**choice.model_dump(mode="json"), "files": _shipped_files(layout)})


def write_card(config: Config, layout: ExperimentLayout) -> None:
    """Write the card of what ships anew, after something in it has changed."""
    choice = read_choice(layout.shipped)
    if choice is not None:
        _write_card(config, layout, read_record(layout.run(choice.arm, choice.seed).record), choice, layout.student)


def forget_decisions(config: Config, layout: ExperimentLayout) -> list[str]:
    """Remove thresholds and promise, which were of files that are gone or of another config, and say so."""
    places = (layout.thresholds, layout.deferral, layout.decided, layout.student / DECISIONS, layout.onnx / DECISIONS)
    if not (found := [place for place in places if place.exists()]):
        return []
    asked = layout.decided.exists()
    for place in found:
        remove(place)
    write_card(config, layout)
    told = "Thresholds and promises of what shipped before are gone: kdlora thresholds, kdlora defer make them anew."
    return [] if asked else [told]


def tell_anew(config: Config, layout: ExperimentLayout, best: RunRecord, choice: Choice) -> None:
    """Write down the reasons for what is shipped already, where other runs have changed them."""
    told = read_choice(layout.shipped)
    if told is not None and told.sentence != choice.sentence:
        _write_card(config, layout, best, choice, layout.student)
        write_json_atomic(layout.shipped, {**choice.model_dump(mode="json"), "files": told.files})


def _write_card(config: Config, layout: ExperimentLayout, best: RunRecord, choice: Choice, folder: Path) -> None:
    base = config.student if config.student.model is not None else config.teacher
    licence = None if base.model is None else read_licence(base.model, base.revision)
    card = student_card(best, licence, reason=choice.sentence, decisions=decision_sentences(layout))
    (folder / "README.md").write_text(card, encoding="utf-8")


def is_shipped(layout: ExperimentLayout, choice: Choice) -> bool:
    """Say whether `student/` and `adapter/` are what the chosen run makes, and whole."""
    told = read_choice(layout.shipped)
    if told is None or (told.arm, told.seed, told.made_of) != (choice.arm, choice.seed, choice.made_of):
        return False
    base = layout.adapter.resolve() / "base"  # beside the shipped adapter, which names the place
    settings = _read(layout.adapter / "adapter_config.json")
    at_home = not base.exists() or settings.get("base_model_name_or_path") == str(base)
    return at_home and told.files.items() <= _shipped_files(layout).items()


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
    """Keep the texts of the scored rows, so that the report can quote them."""
    write_examples(
        layout.examples,
        (
            ExampleText(
                row["id"], split, row["text"], row.get("text_pair"), row.get("starts") or (), row.get("ends") or ()
            )
            for split, rows in splits_by_name(splits, scored=True).items()
            for row in rows
        ),
    )
