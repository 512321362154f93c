"""What a study is: recipes x tasks x seeds, and the units of work that it comes down to."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS, Arm, Config, TrainConfig
from kdlora.configfile import build_config
from kdlora.experiment.stages import settings_for
from kdlora.system.integrity import hash_json

RATE = "student.train.learning_rate"
MAX_LENGTH = 128
"""Longest input of every study that names none; it was the default when the first were recorded, and is in no key."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudyTask(_Part):
    """A task of the study: a GLUE task, or a file of vader's ratings as a regression."""

    glue: str | None = None
    vader: str | None = None
    rows: int | None = None
    """Use only the first so many training rows."""


class Search(_Part):
    """How hyperparameters are tuned: on a part of the training rows, never on the reported validation rows.

    Teacher and copies are made without the held-out rows, as in `kdlora search`. Fewer rows train for more epochs, so
    that a search takes the steps of the reported run: with fewer steps, higher rates would look better than they are.
    """

    fraction: float = 0.2
    """Share of the training rows that is held out to choose by."""
    split_seed: int = 0
    seed: int = 0
    tasks: tuple[str, ...]
    """One point of the grid is chosen for a recipe's arm: the best on the mean over these tasks."""
    grid: dict[str, list[Any]]
    """Config key to values; every recipe takes this grid, and its own keys beside it."""


class Recipe(_Part):
    """Settings laid over the study's base, and what is tuned."""

    settings: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    arms: tuple[Arm, ...] = ("kd-lora", "student-lora")
    unlabelled: int = 0
    """So many training rows after the task's first `rows` teach as texts without labels."""
    copied_labels: bool = False
    """The control learns from the perturbed copies too, each with the label of the text that it was made from."""


class Step(_Part):
    """A piece of the plan; steps are done in their order."""

    recipes: tuple[str, ...]
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)


def _side(value: object) -> object:
    """Read `RECIPE/ARM`."""
    return tuple(value.rsplit("/", 1)) if isinstance(value, str) else value


Side = Annotated[tuple[str, Arm], BeforeValidator(_side)]
"""A recipe and one of its arms."""


class Study(_Part):
    """A study's file."""

    teacher: str
    """Folder of the teacher in `--models`; the student likewise."""
    student: str
    base: dict[str, Any] = {}
    tasks: dict[str, StudyTask]
    search: Search
    recipes: dict[str, Recipe]
    contrasts: tuple[tuple[Side, Side], ...] = Field(min_length=1)
    """What is compared, `[RECIPE/ARM, RECIPE/ARM]`, declared before anything runs; intervals are corrected for all."""
    reference: str = "paper-tuned"
    """The recipe whose training time the others' is a multiple of."""
    steps: tuple[Step, ...] = Field(min_length=1)
    reported: tuple[str, ...] = ()
    """Tasks that the tables and their means are of; without any, all."""

    @property
    def shown(self) -> tuple[str, ...]:
        """The tasks of the tables."""
        return self.reported or tuple(self.tasks)

    def task_settings(self, name: str, places: Places) -> dict[str, Any]:
        """Give the config sections `task` and `data` of a task."""
        task = self.tasks[name]
        if task.glue is not None:
            return {"task": {"name": task.glue}, "data": {"path": str(places.glue), "max_train_examples": task.rows}}
        data = {"train": str(places.table(name)), "max_train_examples": task.rows, "validation_fraction": 0.2}
        return {"task": {"kind": "regression", "text": "text", "label": "rating"}, "data": data}


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        models: folders of pretrained encoders, and `vader`.
        glue: GLUE in the benchmark's own layout.
        out: everything that the study writes.
    """

    models: Path
    glue: Path
    out: Path

    def table(self, task: str) -> Path:
        """Name the file that a task without a GLUE name is read from."""
        return self.out / f"{task}.csv"

    def texts(self, task: str) -> Path:
        """Name the file of a task's texts that are used without their labels."""
        return self.out / f"{task}-unlabelled.csv"

    def run(self, work: Work) -> Path:
        """Name the record of a unit of work."""
        return self.out / work.task / f"{work.arm}-{work.key}.json"


@dataclass(frozen=True)
class Work:
    """One training: an arm of a recipe on a task with a seed.

    Attributes:
        task: its name in the study.
        arm: the arm.
        seed: of the head, the adapters, dropout and the order of the rows.
        config: with everything resolved, the tuned values included.
        held_out: share of the training rows that it is scored on in place of the validation rows; 0 for a reported run.
        split_seed: draws that share.
        copied_labels: the perturbed copies are training rows, with the labels of their texts.
    """

    task: str
    arm: Arm
    seed: int
    config: Config
    held_out: float = 0.0
    split_seed: int = 0
    copied_labels: bool = False

    @property
    def precision(self) -> str:
        """Number format: the study's for students, the machine's best for the teacher's size."""
        return "auto" if self.arm in TEACHER_ARMS else self.config.run.precision

    @property
    def key(self) -> str:
        """Name what made the run: recipes that differ in nothing that this arm reads share it.

        Defaults are left out, so that an option which is added later changes no key.
        """
        config, settings = self.config, settings_for(self.config, self.arm)
        made_of: dict[str, Any] = {
            "task": self.task,
            "rows": [config.data.max_train_examples, self.held_out, self.held_out and self.split_seed],
            "train": settings.model_dump(mode="json", exclude_defaults=True),
            "kind": type(settings).__name__,
            "seed": self.seed,
            "model": Path(str(config.teacher.model if self.arm in TEACHER_ARMS else config.student.model)).name,
        }
        if self.arm not in TEACHER_ARMS and config.student.from_teacher_layers is not None:
            made_of |= {"model": Path(str(config.teacher.model)).name, "layers": config.student.from_teacher_layers}
        if self.held_out:
            made_of["steps"] = "as many as the reported run"
        if self.precision != "auto":
            made_of["precision"] = self.precision
        if self.arm in LORA_ARMS:
            made_of["lora"] = config.lora.model_dump(mode="json", exclude_defaults=True)
        if self.arm in DISTILLED_ARMS:
            made_of["distil"] = config.distil.model_dump(mode="json", exclude_defaults=True)
            made_of["teacher"] = teacher_of(self).key
            made_of |= {"augment": config.data.augment} if config.data.augment else {}
        if self.arm not in TEACHER_ARMS and config.data.unlabelled:
            made_of["unlabelled"] = config.data.max_unlabelled_examples  # the control takes as many steps
        if self.copied_labels:
            made_of |= {"parts": {"copied_labels": True}, "augment": config.data.augment}
        return hash_json(made_of)[:16]


def settings_of(config: Config, arm: Arm) -> TrainConfig:
    """Return how an arm is trained, its longest input filled in."""
    settings = settings_for(config, arm)
    return settings.model_copy(update={"max_length": settings.max_length or MAX_LENGTH})


def teacher_of(work: Work) -> Work:
    """Give the training of the one teacher of a task, which all recipes share; it knows no row that is held out."""
    return Work(work.task, "fft", work.config.teacher_seed, work.config, work.held_out, work.split_seed)


def read_study(path: Path, reported: Sequence[str] = ()) -> Study:
    """Read a study's file.

    Args:
        path: the file. With `extends: FILE`, named from its own folder, it has that file's keys too, where it has none.
        reported: the tasks that the tables are of; default: the file's.
    """
    study = Study.model_validate(_read_keys(path))
    if reported:
        study = study.model_copy(update={"reported": tuple(reported)})
    known: dict[str, Collection[str]] = {"recipe": study.recipes, "task": study.tasks}
    named = [("recipe", name) for step in study.steps for name in (*step.recipes, study.reference)]
    named += [("recipe", name) for contrast in study.contrasts for name, _ in contrast]
    named += [("task", name) for step in study.steps for name in (*step.tasks, *study.search.tasks, *study.reported)]
    for what, name in named:
        if name not in known[what]:
            raise SystemExit(f"{path}: no {what} {name!r}; there are {', '.join(known[what])}")
    return study


def _read_keys(path: Path) -> dict[str, Any]:
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    extended = keys.pop("extends", None)
    return {**_read_keys(path.parent / extended), **keys} if extended else keys


def configure(study: Study, places: Places, task: str, recipe: str, point: Mapping[str, Any]) -> Config:
    """Resolve the config of a recipe on a task.

    Args:
        study: the study.
        places: where models and data lie.
        task: name of the task.
        recipe: name of the recipe.
        point: tuned values by config key.
    """
    values: dict[str, Any] = {}
    for layer in (study.base, study.recipes[recipe].settings, study.task_settings(task, places)):
        _merge(values, layer)
    own_student = values.get("student", {}).get("from_teacher_layers") is None
    names = {"teacher": study.teacher} | ({"student": study.student} if own_student else {})
    _merge(values, {key: {"model": str(places.models / name)} for key, name in names.items()})
    if count := study.recipes[recipe].unlabelled:
        _merge(values, {"data": {"unlabelled": str(places.texts(task)), "max_unlabelled_examples": count}})
    return build_config(values, [f"{key}={value}" for key, value in point.items()])


def _merge(into: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        if isinstance(value, Mapping):
            inner = into.setdefault(key, {})
            into[key] = dict(inner)
            _merge(into[key], value)
        else:
            into[key] = value


def grid_points(study: Study, recipe: str, arm: Arm) -> list[dict[str, Any]]:
    """List the points that are tried for an arm of a recipe; the teacher's keys only where a teacher teaches."""
    grid = {**study.search.grid, **study.recipes[recipe].grid}
    if arm not in LORA_ARMS:
        grid.pop(RATE, None)
    if arm not in DISTILLED_ARMS:
        grid = {key: values for key, values in grid.items() if not key.startswith("distil.")}
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def search_work(study: Study, places: Places, recipe: str, arm: Arm, point: Mapping[str, Any]) -> list[Work]:
    """List the trainings that show how good a point of the grid is."""
    search, found = study.search, []
    for task in search.tasks:
        work = work_of(study, places, recipe, arm, point, task, search.seed)
        config = _with_the_same_steps(work.config, search.fraction)
        found.append(dataclasses.replace(work, config=config, held_out=search.fraction, split_seed=search.split_seed))
    return found


def _with_the_same_steps(config: Config, held_out: float) -> Config:
    """Train so much longer that a part of the rows makes as many steps as all of them."""
    update = {}
    for name in ("teacher", "student"):
        section = getattr(config, name)
        train = section.train.model_copy(update={"epochs": section.train.epochs / (1 - held_out)})
        update[name] = section.model_copy(update={"train": train})
    return config.model_copy(update=update)


def work_of(
    study: Study, places: Places, recipe: str, arm: Arm, point: Mapping[str, Any], task: str, seed: int
) -> Work:
    """Give the reported training of a recipe's arm on a task with a seed."""
    own_copies = study.recipes[recipe].copied_labels and arm == "student-lora"
    return Work(task, arm, seed, configure(study, places, task, recipe, point), copied_labels=own_copies)


def choose_point(
    study: Study, places: Places, recipe: str, arm: Arm, scores: Mapping[str, float]
) -> tuple[dict[str, Any] | None, list[Work]]:
    """Choose the best point of the grid, on the mean over the search's tasks.

    Args:
        study: the study.
        places: where models and data lie.
        recipe: name of the recipe.
        arm: the arm.
        scores: by the keys of finished work.

    Returns:
        The point, or None while trainings are missing; and those.
    """
    points = grid_points(study, recipe, arm)
    if len(points) == 1:
        return points[0], []
    work = [search_work(study, places, recipe, arm, point) for point in points]
    missing = [one for group in work for one in group if one.key not in scores]
    if missing:
        return None, missing
    means = [sum(scores[one.key] for one in group) / len(group) for group in work]
    return points[means.index(max(means))], []


def reported_work(
    study: Study, places: Places, recipe: str, arm: Arm, point: Mapping[str, Any], step: Step
) -> Iterator[Work]:
    """List the reported trainings of a recipe's arm in a step."""
    for seed, task in itertools.product(step.seeds, step.tasks):
        yield work_of(study, places, recipe, arm, point, task, seed)


def all_seeds(study: Study) -> Sequence[int]:
    """List the seeds of all steps."""
    return sorted({seed for step in study.steps for seed in step.seeds})
