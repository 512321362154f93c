"""What the benchmark `strangers` measures, as its YAML file declares it, and the experiments that it comes down to."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from kdlora import Config, build_config
from kdlora.config import ARMS, Kind
from kdlora.configfile import merge
from kdlora.evidence.records import ExperimentLayout


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSet(_Part):
    """A source, and what of it a stranger would have."""

    half: Literal["tuning", "reported", "guard"]
    train: str | tuple[str, ...]
    """The source's file or files, below `--data` or `--models`; `test` and `validation` likewise."""
    test: str | None = None
    validation: str | None = None
    test_share: float = 0.25
    """Share of the rows that is drawn as test file where there is none."""
    group: int | None = None
    """Column whose part before `_` names what a drawn split keeps together."""
    header: bool = True
    columns: dict[str, str | int] = {}
    """Name here to name (or number) in the source; the last column is the label. A CoNLL file needs none."""
    names: dict[str, str] = {}
    """Words for the source's labels."""
    rest: str | None = None
    """One name for all labels that `names` does not list; default: they keep theirs."""
    join: int = 1
    """So many texts of one class become one."""
    mixed: int = 1
    """So many texts of different classes, or fewer, become one, which has all their labels."""
    kept: tuple[str, ...] = ()
    """The labels that mixed texts may have; a text with none of them has no label. Default: all."""
    cut: dict[str, int] = {}
    """Training rows that are drawn of a class, before all else; of a class that is not named, all."""
    tail: int | None = None
    """Training rows of the last class, in a drawn order; the others rise to the largest, each by one factor."""
    rows: int | None = None
    """Training rows that are drawn; default: all."""
    format: Literal["csv", "jsonl", "conll"] = "csv"
    """Of the files here; sentences of CoNLL files are copied as they are."""
    show_case: bool = False
    """Of a CoNLL file: put ^ after words that begin with a capital letter, ^^ after those of capitals alone."""
    kind: Kind | Literal["auto"] = "auto"
    """Set where the product asks for it."""

    @property
    def text(self) -> list[str]:
        """The text columns."""
        return list(self.columns)[:-1]

    @property
    def label(self) -> str:
        """The label column."""
        return list(self.columns)[-1]

    def limit(self, rows: int | None) -> int | None:
        """Give the number of training rows for a pair that takes at most so many; None for all."""
        return min((limit for limit in (self.rows, rows) if limit is not None), default=None)

    def train_file(self, limit: int | None) -> str:
        """Name the training file of so many rows."""
        return f"train.{self.format}" if limit is None else f"train-{limit}.{self.format}"


class Pair(_Part):
    """Two models, and the sets that they are measured on."""

    teacher: str
    student: str | None = None
    layers: tuple[int, ...] | None = None
    """Of the teacher, in place of a student."""
    sets: tuple[str, ...]
    settings: tuple[str, ...]
    rows: int | None = None
    seeds: tuple[int, ...] | None = None

    def sides(self, names: Sequence[str]) -> list[str]:
        """Give those of a contrast's sides whose settings this pair has."""
        return [name for name in names if name.split("/")[0] in self.settings]


class Settings(_Part):
    """A recipe: what is laid over the bare config; the product's defaults where it sets nothing."""

    arms: tuple[str, ...] | None = None
    config: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    """One experiment for each point; the best on validation, mean over seeds, is reported."""
    teacher_of: str | None = None
    """Settings whose fine-tuned teacher teaches here too, in place of one that is trained again."""
    student_of: str | None = None
    """Settings whose shipped student is trained further here (they were run with --keep)."""


class Contrast(_Part):
    """What is subtracted from what: sides `settings/arm`; of several that a pair has the best on test."""

    first: tuple[str, ...]
    second: tuple[str, ...]
    share: bool = False
    """Not the difference: what the first keeps of the second in per cent, where one seed of it stands for all.
    Its mean is over the sets of all pairs."""


class Plan(_Part):
    """The file."""

    seeds: tuple[int, ...]
    draw_seed: int = 0
    sets: dict[str, DataSet]
    pairs: dict[str, Pair]
    settings: dict[str, Settings]
    contrasts: dict[str, Contrast]


@dataclass(frozen=True)
class Job:
    """One experiment: a pair on a set, with settings and a point of their grid."""

    pair: str
    dataset: str
    settings: str
    point: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The folder's path below `runs`."""
        return "/".join((self.pair, self.dataset, "-".join([self.settings, *(str(value) for _, value in self.point)])))

    def beside(self, settings: str, out: Path) -> Path:
        """Give the folder of other settings of this pair and set."""
        return out / "runs" / Job(self.pair, self.dataset, settings).name


def read_plan(file: Path) -> Plan:
    """Read a plan, and refuse names that it does not declare."""
    plan = Plan.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
    sides = {f"{name}/{arm}" for name, own in plan.settings.items() for arm in (*(own.arms or ARMS), "shipped")}
    named = [(name, plan.sets) for pair in plan.pairs.values() for name in pair.sets]
    named += [(name, plan.settings) for pair in plan.pairs.values() for name in pair.settings]
    named += [
        (name, plan.settings) for own in plan.settings.values() for name in (own.teacher_of, own.student_of) if name
    ]
    named += [(side, sides) for one in plan.contrasts.values() for side in (*one.first, *one.second)]
    if unknown := sorted({name for name, known in named if name not in known}):
        raise SystemExit(f"{file}: not declared: {', '.join(unknown)}")
    return plan


def plan_jobs(plan: Plan) -> Iterator[Job]:
    """List all experiments, settings of one pair and set together."""
    for pair, own in plan.pairs.items():
        for dataset, settings in itertools.product(own.sets, own.settings):
            grid = plan.settings[settings].grid
            for values in itertools.product(*grid.values()):
                yield Job(pair, dataset, settings, tuple(zip(grid, values, strict=True)))


def configure(plan: Plan, job: Job, out: Path, models: Path) -> Config:
    """Build the config of an experiment: data, models, arms and seeds, and what its settings declare."""
    pair, dataset, settings = plan.pairs[job.pair], plan.sets[job.dataset], plan.settings[job.settings]
    run: dict[str, Any] = {"seeds": list(pair.seeds or plan.seeds)}
    if settings.arms is not None:
        run["arms"] = list(settings.arms)
    data = {"train": dataset.train_file(dataset.limit(pair.rows)), "test": f"test.{dataset.format}"}
    if dataset.validation is not None:
        data["validation"] = f"validation.{dataset.format}"
    student = (
        {"model": str(models / pair.student)} if pair.student else {"from_teacher_layers": list(pair.layers or ())}
    )
    teacher = {"model": str(models / pair.teacher)}
    if settings.teacher_of is not None:
        teacher["fine_tuned"] = str(ExperimentLayout(job.beside(settings.teacher_of, out)).teacher)
    if settings.student_of is not None:
        student = {"model": str(ExperimentLayout(job.beside(settings.student_of, out)).student)}
    task = {"text": dataset.text, "label": dataset.label, "kind": dataset.kind} if dataset.columns else {}
    values: dict[str, Any] = {"task": task, "data": data, "teacher": teacher, "student": student, "run": run}
    merge(values, copy.deepcopy(settings.config))
    return build_config(values, [f"{key}={value}" for key, value in job.point], base=out / "data" / job.dataset)
