"""Which runs a suite or an experiment has, which of them several cells share, and what each waits for."""

from __future__ import annotations

import copy
import functools
import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, ROUNDING_KEYS, Arm, Config, StudentConfig
from kdlora.configfile import build_config, merge
from kdlora.errors import ConfigError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment.settle import Chosen, with_values
from kdlora.experiment.suitefile import Settings, SuiteConfig, configurations
from kdlora.section import Section, without_later_keys
from kdlora.system.integrity import hash_json


@dataclass(frozen=True)
class PlannedRun:
    """One arm of one configuration with one seed; the runs of an experiment have no `task`, and all lie in its folder.

    `folder` is relative to the suite's; its name holds a hash of everything that decides the figures. `settings` are
    what the grid set, as far as the arm uses it. Of several families with the run, `family` is the first.
    """

    arm: Arm
    seed: int
    config: Config
    task: str = ""
    folder: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    family: str = ""

    @property
    def key(self) -> str:
        """Name the run's own folder, relative to the suite's."""
        return f"{self.folder}/runs/{self.arm}-seed{self.seed}".removeprefix("/")

    def layout(self, root: Path, texts_of: PlannedRun | None = None) -> ExperimentLayout:
        texts = hash_json((texts_of or self).config.data.row_settings)[:10] if self.task else ""
        return ExperimentLayout(root / self.folder, shared_folder=root, texts=texts)


def plan_runs(config: Config) -> list[PlannedRun]:
    """Order the runs: a bag of words, the teacher if asked for or needed, the arms without it, then what it teaches."""
    arms = sorted(config.run.arms, key=DISTILLED_ARMS.__contains__)  # a control can still speak against the teacher
    words = [PlannedRun("words", config.run.seeds[0], config)] if "words" in arms else []
    runs = [PlannedRun(arm, seed, config) for arm in arms if arm != "words" for seed in config.run.seeds]
    if config.given_teacher:
        return [*words, *(run for run in runs if run.arm != "fft" or run.seed == config.run.seeds[0])]
    teacher = PlannedRun(config.teacher_arm, config.teacher_seed, config)
    if config.teacher_arm in config.run.arms or set(config.run.arms) & DISTILLED_ARMS:
        return [*words, teacher, *(run for run in runs if run != teacher)]
    return [*words, *runs]


@dataclass
class Lesson:
    """The distilled runs, and the runs of which the best teaches them; none of these where the teacher is given."""

    candidates: tuple[PlannedRun, ...]
    students: list[PlannedRun] = field(default_factory=list)


@dataclass(frozen=True)
class Plan:
    """A suite's runs: every task x family x arm, and for each task x family the runs of which one teaches, if any."""

    suite: SuiteConfig
    cells: dict[tuple[str, str, str], tuple[PlannedRun, ...]]
    teachers: dict[tuple[str, str], tuple[PlannedRun, ...]]

    def runs_of_families(self) -> list[PlannedRun]:
        """List the runs of every family, also those that it shares, teachers first within a task."""
        found: dict[tuple[str, str], PlannedRun] = {}
        for (task, family, _), runs in self.cells.items():
            for run in (*self.teachers.get((task, family), ()), *runs):
                found.setdefault((family, run.key), run)
        return list(found.values())

    def runs(self) -> list[PlannedRun]:
        """List every run once."""
        found: dict[str, PlannedRun] = {}
        for run in self.runs_of_families():
            found.setdefault(run.key, run)
        return list(found.values())

    def lessons(self) -> list[Lesson]:
        """Say which runs teach which; students of the same candidates who read the same texts share a lesson."""
        lessons: dict[tuple[Any, ...], Lesson] = {}
        for run in self.runs():
            if run.arm in DISTILLED_ARMS:
                candidates = self.teachers[run.task, run.family]
                names = *(one.key for one in candidates), run.config.data.row_settings
                lessons.setdefault(names, Lesson(candidates)).students.append(run)
        return list(lessons.values())


Rows = Mapping[tuple[Any, ...], Mapping[str, int]]
"""The rows of each split, by `DataConfig.row_settings`."""


def make_plan(
    suite: SuiteConfig,
    chosen: Mapping[tuple[str, str], Chosen] | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> Plan:
    """Lay out every run of a suite; without `chosen`, what the suite leaves open stays open.

    `rows`, by task, are of the texts that a grid sets: a run's epochs go by its own.
    """
    cells: dict[tuple[str, str, str], tuple[PlannedRun, ...]] = {}
    teachers: dict[tuple[str, str], tuple[PlannedRun, ...]] = {}
    for task, family in itertools.product(suite.tasks, suite.families):
        facts, own = (chosen or {}).get((task, family)), (rows or {}).get(task, {})
        for arm in suite.arms:
            cells[task, family, arm] = tuple(_runs(suite, task, family, arm, facts, own))
        if set(suite.arms) & DISTILLED_ARMS:
            teacher = whole_config(suite, task, family).teacher_arm
            candidates = tuple(_runs(suite, task, family, teacher, facts, own, teaching=True))
            teachers[task, family] = candidates if suite.teacher == "best" else candidates[:1]
    return Plan(suite, cells, teachers)


def _runs(
    suite: SuiteConfig, task: str, family: str, arm: Arm, chosen: Chosen | None, rows: Rows, *, teaching: bool = False
) -> Iterator[PlannedRun]:
    """Give the runs of one cell, each effective configuration once; of the teacher's only the seed that teaches."""
    base = _base_values(suite, task, family, (arm,))
    seen: set[str] = set()
    for settings in configurations(suite.grids.of(arm)):
        config = build_config(base, settings.items(), where=f"{suite.name}: {task}, {family}, {arm}")
        if config.given_teacher:
            raise ConfigError(
                "a suite trains its teachers, but teacher.fine_tuned, teacher.logits or teacher.probabilities is set; "
                "use `kdlora run` for a teacher that is given"
            )
        effective = reset_unused(config, arm)
        if chosen is not None:
            read = (rows.get(one.data.row_settings) for one in (config, effective))
            own = replace(chosen, rows=next(filter(None, read), chosen.rows))
            effective = reset_unused(own.fill_in(config), arm)
        folder = f"runs/{task}/{arm}-{hash_json(identity_over(settings, effective))[:10]}"
        if folder not in seen:
            seen.add(folder)
            kept = _used_settings(settings, config, arm)
            seeds = (config.teacher_seed,) if teaching else suite.seeds[:1] if arm == "words" else suite.seeds
            yield from (PlannedRun(arm, seed, effective, task, folder, kept, family) for seed in seeds)


def whole_config(suite: SuiteConfig, task: str, family: str) -> Config:
    """Give the config of a task and family with all arms of the suite, no grid applied."""
    return build_config(_base_values(suite, task, family, suite.arms), where=f"{suite.name}: {task}, {family}")


def _base_values(suite: SuiteConfig, task: str, family: str, arms: Sequence[str]) -> dict[str, Any]:
    """Lay what all share, the family and the task over one another."""
    base: dict[str, Any] = {}
    run = {"run": {"arms": list(arms), "seeds": list(suite.seeds)}}
    try:
        for part in (suite.config, suite.families[family], suite.tasks[task], run):
            merge(base, copy.deepcopy(part))
    except ConfigError as error:
        raise ConfigError(f"{suite.name}: {task}, {family}: {error}") from None
    return base | {"name": f"{suite.name} {task} {family}"[:100]}


def reset_unused(config: Config, arm: Arm) -> Config:
    reset = functools.reduce(_reset, _unused_keys(config, arm), config)
    key = {"student-fft": "head_learning_rate"}.get(arm)  # which is that of its own head, too
    if arm == "lora" and config.student.train.max_length is None:  # no student was looked at
        key = "max_length"
    return with_values(reset, {f"teacher.train.{key}": getattr(config.teacher.train, key)}) if key else reset


def _unused_keys(config: Config, arm: Arm) -> list[str]:
    unused = ["family", *(["student.full_learning_rate"] if arm in LORA_ARMS else [])]
    if arm not in LORA_ARMS and not (arm in DISTILLED_ARMS and config.teacher_arm == "lora"):
        unused.append("lora")
    if arm not in DISTILLED_ARMS:  # perturbed copies are texts for the students of a teacher alone
        unused += [
            "data.augment",
            "distil",
            *([] if arm in ("fft", config.teacher_arm) else ["teacher.train", "teacher.seed"]),
        ]
    if arm in ("words", "fft", config.teacher_arm):  # a teacher labels more texts, and learns from none of them
        unused += ["data.unlabelled", "data.max_unlabelled_examples"]
    if "lora" not in (arm, config.teacher_arm):
        unused += ["teacher.adapter_learning_rate"]
    if arm in ("words", "fft") or (arm == config.teacher_arm and config.teacher.adapter_learning_rate is not None):
        unused += ["student"]
    elif arm == "lora":
        unused += [f"student.{key}" for key in StudentConfig.model_fields if key != "train"]
    if arm == "words" or (arm in ("student-fft", "student-lora") and config.student.from_teacher_layers is None):
        unused += ["teacher"]
    return unused


def _reset(section: Section, key: str) -> Any:
    name, _, rest = key.partition(".")
    value = _reset(getattr(section, name), rest) if rest else type(section).model_fields[name].default
    return section.model_copy(update={name: value})


def identity(config: Config) -> dict[str, Any]:
    """Give what must be equal for two runs of an arm with a seed to be the same run, their teacher aside."""
    values = config.model_dump(mode="json", exclude={"name", "family", "recipe", "export", "defer", "report"})
    values = without_later_keys(values)
    values["run"] = {key: value for key, value in values["run"].items() if key in ("precision", "device", "threads")}
    return values


def run_identity(config: Config) -> dict[str, Any]:
    """Give `identity` without what changes figures by rounding alone: after a lack of memory a suite goes on."""
    keys = (f"{role}.train.{key}" for role in ("teacher", "student") for key in ROUNDING_KEYS)
    return identity(functools.reduce(_reset, keys, config))


def identity_over(keys: Iterable[str], config: Config) -> dict[str, Any]:
    """Give the identity of a run beside others with other values of these keys, of memory and speed among them."""
    return identity(config) if any(key.endswith(ROUNDING_KEYS) for key in keys) else run_identity(config)


def _used_settings(settings: Settings, config: Config, arm: Arm) -> tuple[tuple[str, Any], ...]:
    """Keep the settings that the arm uses, with the values that the config made of them."""
    unused = [*_unused_keys(config, arm), *([] if arm in ("fft", config.teacher_arm) else ["teacher.train"])]
    values = config.model_dump(mode="json")
    own = ("teacher.train.head_learning_rate",) if arm in ("student-fft", "kd-fft") else ()
    used = [key for key in settings if key in own or not any(f"{key}.".startswith(f"{one}.") for one in unused)]
    return tuple((key, functools.reduce(operator.getitem, key.split("."), values)) for key in used)
