"""What a suite file can say: tasks x families x arms x configurations x seeds."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, Arm
from kdlora.configfile import absolute_paths, absolute_value, assign, describe_faults, merge, read_mapping
from kdlora.errors import ConfigError
from kdlora.searchconfig import Resources
from kdlora.section import WINDOW_KEYS, Section

Settings = dict[str, Any]
Axes = tuple[Annotated[tuple[Settings, ...], Field(min_length=1)], ...]
"""The axes of a grid; each holds settings (config key to value), of which a configuration takes one."""
Name = Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
"""Of a task or family; results lie in folders of these names."""


def _parse_axes(value: object) -> object:
    """Read a grid: `key: [values]` is an axis for each key; a list of mappings is one axis of joint settings."""
    axes: list[object] = []
    for part in value if isinstance(value, list | tuple) else [value]:
        for key, values in part.items() if isinstance(part, Mapping) else ():
            if not isinstance(values, list | tuple):
                raise ValueError(f"{key}: expected a list of values, got {values!r}")  # noqa: TRY004 - pydantic reports these
            axes.append([{key: one} for one in values])
        if not isinstance(part, Mapping):
            axes.append(part)
    return axes


def _parse_tasks(value: Any) -> Any:
    """Read a list of GLUE tasks, or a mapping from names to partial configs: a name with no task or file is GLUE's."""
    if isinstance(value, str | list | tuple):
        value = {_folded(name): None for name in ([value] if isinstance(value, str) else value)}
    if not isinstance(value, Mapping):
        return value
    found = {}
    for name, part in value.items():
        data = part.get("data") if isinstance(part, Mapping) else None
        is_glue = isinstance(part, Mapping | None) and not (isinstance(data, Mapping) and "train" in data)
        found[str(name)] = {"task": {"name": _folded(name)}} | dict(part or {}) if is_glue else part
    return found


def _folded(name: object) -> str:
    """Spell a name as it is compared: the benchmark's own SST-2 is sst2."""
    return str(name).lower().replace("-", "").replace("_", "")


def _own_name(name: str, there: Mapping[str, Any]) -> str:
    """Give the name under which a part stands in the file: this one, or else one that compares the same."""
    return next((one for one in (name, *there) if one in there and _folded(one) == _folded(name)), name)


def _parse_families(value: Any) -> Any:
    """Read a list of the paper's families, or a mapping from names to partial configs."""
    if not isinstance(value, str | list | tuple):
        return value
    return {str(name): {"family": name} for name in ([value] if isinstance(value, str) else value)}


Grid = Annotated[Axes, BeforeValidator(_parse_axes)]
_TEXTS_OF_STUDENTS = {f"data.{key}" for key in ("unlabelled", "max_unlabelled_examples", "augment", *WINDOW_KEYS)}
"""Keys of the data that leave the labelled rows as they are."""
_IDLE = (
    *("run.arms", "run.seeds", "run.fail_fast", "report.paper"),
    *("defer.error", "export.thresholds", "export.calibrate", "export.min_recall"),
)
"""Keys of an experiment that a suite would read and not follow."""


_MODELS = tuple(f"{role}.{key}" for role in ("teacher", "student") for key in ("model", "revision"))
_NO_SETTINGS = ("name", "family", "task", "export", "defer", "report", "run.arms", "run.seeds", "run.fail_fast")
_UNUSED = {
    "fft": ("student", "distil", "lora", "data.unlabelled", "data.max_unlabelled_examples", "data.augment"),
    "adapters": ("student.full_learning_rate",),
    "full_students": (),
}
"""What changes nothing of any arm of a grid, beside what is no setting of a training."""


class Grids(Section):
    """The configurations of each kind of arm; an empty grid is the one configuration that `config` describes."""

    fft: Grid = ()
    """Of `fft`, the teacher: keys of `teacher.train`."""
    adapters: Grid = ()
    """Of `lora`, `kd-lora` and `student-lora`, alike: keys of `lora`, `student.train` and `distil`."""
    full_students: Grid = ()
    """Of `student-fft` and `kd-fft`, alike: keys of `student` and `distil`."""

    @field_validator("full_students")
    @classmethod
    def _has_rates_of_its_own(cls, axes: Axes) -> Axes:
        for key in (key for axis in axes for settings in axis for key in settings):
            if key in ("student.train.learning_rate", "student.train.head_learning_rate"):
                other = "teacher.train.head" if "head" in key else "student.full"
                raise ValueError(f"{key} is of adapters; the rate of these arms is {other}_learning_rate")
        return axes

    @model_validator(mode="after")
    def _changes_trainings(self) -> Self:
        for grid, unused in _UNUSED.items():
            for key in (key for axis in getattr(self, grid) for settings in axis for key in settings):
                if key in _MODELS:
                    raise ValueError(f"{grid}: {key} names a model, which has a rate of its own; make it two families")
                if any(f"{key}.".startswith(f"{one}.") for one in (*_NO_SETTINGS, *unused)):
                    raise ValueError(f"{grid}: {key} changes nothing of the trainings of this grid; delete it")
        return self

    def of(self, arm: Arm) -> Axes:
        if arm == "words":
            return ()
        return self.fft if arm == "fft" else self.adapters if arm in LORA_ARMS else self.full_students


class SuiteConfig(Section):
    """A suite: tasks x families x arms x configurations x seeds."""

    name: str = Field(pattern=r"^\w[\w .+-]*$", max_length=60)
    """Name of the suite; results go to `runs/<name>`."""
    tasks: Annotated[dict[Name, Settings], BeforeValidator(_parse_tasks)] = Field(min_length=1)
    """GLUE tasks, or names with the sections `task` and `data` of a config."""
    families: Annotated[dict[Name, Settings], BeforeValidator(_parse_families)] = Field(min_length=1)
    """The paper's families, or names with the sections `teacher` and `student` of a config."""
    config: Settings = Field(default_factory=dict)
    """What all runs have in common, as in the config of one experiment."""
    arms: tuple[Arm, ...] = Field(default=("fft", "lora", "kd-lora", "student-lora"), min_length=1)
    """The paper's three and the control that it lacks, or any others."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Every configuration runs once with each."""
    grids: Grids = Grids()
    """The configurations of each kind of arm."""
    teacher: Literal["best", "first"] = "best"
    """Which `fft` configuration teaches: the best on the validation split, or the first of the grid."""
    best: int = Field(default=6, ge=1)
    """A table's figure is the median of so many best configurations, as in the paper."""
    resources: Resources = Resources()
    """What a run needs of a node, where a cluster carries the suite out."""

    @model_validator(mode="after")
    def _names_no_idle_keys(self) -> Self:
        parts = {"config": self.config} | {f"families.{name}": part for name, part in self.families.items()}
        for where, part in (parts | {f"tasks.{name}": part for name, part in self.tasks.items()}).items():
            for section, key in (one.split(".") for one in _IDLE):
                values = part.get(section)
                unset = ("none", "false", "no", "off", "{}")
                if isinstance(values, Mapping) and str(values.get(key)).lower() not in unset:
                    raise ValueError(
                        f"{where}.{section}.{key}: a suite has `arms` and `seeds` at its top level, carries out all "
                        "runs, ships nothing, and has the paper's figures as they are. Delete the key"
                    )
        taught = [arm for arm in self.arms if arm in DISTILLED_ARMS]
        for arm in (*taught, *(("fft", "lora") if taught else ())):
            for key in (key for axis in self.grids.of(arm) for settings in axis for key in settings):
                if key.startswith("data.") and key not in _TEXTS_OF_STUDENTS:
                    raise ValueError(f"grids: {key} is of rows that one teacher labels for all; make it two tasks")
                if arm in taught and key.startswith("teacher.") and key != "teacher.train.head_learning_rate":
                    raise ValueError(f"grids: {key} is of the one teacher of all {arm} runs; make it two families")
        return self


def configurations(axes: Axes) -> Iterator[Settings]:
    return (dict(itertools.chain.from_iterable(part.items() for part in parts)) for parts in itertools.product(*axes))


def load_suite(path: str | Path, overrides: Iterable[str] = ()) -> SuiteConfig:
    """Read a suite file.

    Args:
        path: a YAML file; relative paths in it resolve against its folder.
        overrides: `key=value` assignments (`config.run.threads=1`, `seeds=[0,1]`), values in YAML; relative paths
            in them resolve against the current folder.

    Raises:
        ConfigError: with all faults of the file at once; unknown tasks and families are told where runs are planned.

    Examples:
        >>> suite = load_suite("configs/paper-small.yaml", ["tasks=[sst2]"])
    """
    file = Path(path)
    return build_suite(read_mapping(file, "suite file"), overrides, base=file.resolve().parent, where=str(file))


def build_suite(
    values: Mapping[str, Any], overrides: Iterable[str] = (), *, base: Path | None = None, where: str = "suite"
) -> SuiteConfig:
    changes: dict[str, Any] = {}
    for override in overrides:
        assign(changes, override)
    has_source = _names_source(values) or _names_source(changes)
    merged = _with_absolute_paths(values, base or Path.cwd(), has_source)
    try:
        changes = _with_absolute_paths(changes, Path.cwd(), has_source)
        for key, parse in (("tasks", _parse_tasks), ("families", _parse_families)):
            there = parse(merged.get(key, {}))
            if key not in changes or not isinstance(there, dict):
                continue
            asked = changes.pop(key)
            if isinstance(asked, dict):  # a key of one leaves the others in
                for name, part in asked.items():
                    merge(there, {_own_name(name, there): part}, None)
                merged[key] = there
            else:  # names choose among the file's own, too
                names = [_own_name(str(name), there) for name in (asked if isinstance(asked, list) else [asked])]
                own = {name: there[name] for name in names if name in there}
                merged[key] = own | parse([name for name in names if name not in there])
        merge(merged, changes, SuiteConfig)
        return SuiteConfig.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe_faults(error, where, SuiteConfig)) from None
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{where}: {error}") from None


def _names_source(values: Mapping[str, Any]) -> bool:
    """Say whether `data.path` stands anywhere; what stands in another part may then be names of its splits."""
    groups = [one for key in ("tasks", "families") if isinstance(one := values.get(key), Mapping)]
    parts = [values.get("config"), *(part for group in groups for part in group.values())]
    data = [part.get("data") for part in parts if isinstance(part, Mapping)]
    return any(isinstance(one, Mapping) and one.get("path") is not None for one in data)


def _with_absolute_paths(values: Mapping[str, Any], base: Path, has_source: bool) -> dict[str, Any]:
    def resolve(part: Any) -> Any:
        return absolute_paths(dict(part), base, has_source=has_source) if isinstance(part, Mapping) else part

    resolved = dict(values) | {"config": resolve(values.get("config", {}))}
    for key in ("tasks", "families"):
        if isinstance(values.get(key), Mapping):
            resolved[key] = {name: resolve(part) for name, part in values[key].items()}
    if isinstance(values.get("grids"), Mapping):
        resolved["grids"] = {name: _absolute_grid(part, base, has_source) for name, part in values["grids"].items()}
    return resolved


def _absolute_grid(part: Any, base: Path, has_source: bool) -> Any:
    """Make the paths of a grid absolute; an axis has a list of values, joint settings have one each."""
    if isinstance(part, list | tuple):
        return [_absolute_grid(one, base, has_source) for one in part]
    if not isinstance(part, Mapping):
        return part
    found = dict[Any, Any](part)
    for key, value in part.items():
        values = value if isinstance(value, list | tuple) else [value]
        absolute = [absolute_value(str(key), one, base, has_source=has_source) for one in values]
        found[key] = absolute if values is value else absolute[0]
    return found


def save_suite(suite: SuiteConfig) -> str:
    return yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False)
