"""Read experiment folders back: records, predictions, texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from kdlora.config import ARMS
from kdlora.configfile import load_config
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, DataError, KdLoraError
from kdlora.evidence.predictions import ExampleText, Predictions, read_examples, read_predictions
from kdlora.evidence.records import ExperimentLayout, RunLayout, RunRecord, read_record, read_results
from kdlora.evidence.stats import MeanSd, mean_sd
from kdlora.report.findings import Choice, choose_student, read_choice
from kdlora.report.shipped import Shipped, read_shipped


@dataclass(frozen=True)
class Run:
    """One run as it lies on disk: figures link to the `path` of its record; predictions may be missing."""

    record: RunRecord
    path: Path
    predictions: Predictions | None

    def score(self, split: str) -> float | None:
        return self.record.test_score if split == "test" else self.record.score

    def metrics(self, split: str) -> dict[str, float | None]:
        return self.record.test_metrics if split == "test" else self.record.metrics


@dataclass(frozen=True)
class Experiment:
    """One experiment: arms × seeds on one task, what could not be read of it, and figures of the exported student."""

    name: str
    task: Task
    folder: Path
    runs: tuple[Run, ...]
    faults: tuple[str, ...] = ()
    shipped: Shipped | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms in the usual order."""
        return tuple(dict.fromkeys(run.record.arm for run in self.runs))

    @cached_property
    def split(self) -> str:
        """The split of the headline: test where every finished run has it, else validation."""
        finished = [run for run in self.runs if run.record.status == "finished"]
        return "test" if finished and all(run.record.test_score is not None for run in finished) else "validation"

    def finished(self, arm: str) -> tuple[Run, ...]:
        """List the finished runs of an arm that have a score."""
        own = (run for run in self.runs if run.record.arm == arm and run.record.status == "finished")
        return tuple(run for run in own if run.score(self.split) is not None)

    @property
    def unfinished(self) -> tuple[Run, ...]:
        """The runs that failed or never ended."""
        return tuple(run for run in self.runs if run.record.status != "finished")

    def score(self, arm: str) -> MeanSd | None:
        """Summarise an arm's score over its seeds; None where no run of it finished."""
        values = [value for run in self.finished(arm) if (value := run.score(self.split)) is not None]
        return mean_sd(values) if values else None

    def predictions(self, arm: str) -> list[Predictions]:
        """Give what the finished runs of an arm predicted on the headline's split, where it was kept."""
        return [run.predictions.only(self.split) for run in self.finished(arm) if run.predictions is not None]

    @cached_property
    def choice(self) -> Choice | None:
        """What was shipped; where nothing was yet, what would be."""
        recorded = read_choice(ExperimentLayout(self.folder).shipped)
        if recorded is not None and self.finished(recorded.arm):
            return recorded
        return choose_student(self.task, [run for run in self.runs if run.score(self.split) is not None])

    @property
    def teacher_arm(self) -> str:
        """The arm that teaches: `fft`, or `lora` where the teacher is tuned by adapters."""
        return self.runs[0].record.teacher_arm

    @property
    def student_arm(self) -> str | None:
        """The arm that ships; None where no student run has finished with a score."""
        return None if self.choice is None else self.choice.arm

    @cached_property
    def shows_paper(self) -> bool:
        """Whether the config asks for the paper's claims."""
        try:
            return load_config(ExperimentLayout(self.folder).config).report.paper
        except (KdLoraError, OSError):
            return False

    @cached_property
    def examples(self) -> dict[tuple[str, str], ExampleText]:
        """The texts of the scored rows; empty where they were not kept."""
        try:
            return read_examples(ExperimentLayout(self.folder).examples)
        except ArtifactError:
            return {}


def load_experiments(folders: Sequence[Path | str], *, runs: bool = False) -> list[Experiment]:
    """Read experiment folders, and those of single runs where they may be; runs of different tasks are kept apart."""
    if not folders:
        raise ArtifactError(f"expected at least one experiment{' or run' if runs else ''} folder, got none")
    found: list[Experiment] = []
    for folder in dict.fromkeys(map(Path, folders)):
        place = RunLayout(folder)
        if runs and place.record.is_file():
            run, faults = load_run(read_record(place.record), place)
            name = f"{run.record.experiment}: {folder.name}"
            found.append(Experiment(name, _task_of(run), folder.parent.parent, (run,), faults))
        else:
            found += _load_folder(ExperimentLayout(folder))
    names = [experiment.name for experiment in found]
    return [
        replace(one, name=f"{one.name} ({one.folder.name}, {number})") if names.count(one.name) > 1 else one
        for number, one in enumerate(found, start=1)
    ]


def _load_folder(layout: ExperimentLayout) -> list[Experiment]:
    order: dict[str, int] = {arm: place for place, arm in enumerate(ARMS)}
    records = sorted(_records_of(layout), key=lambda one: (order.get(one[0].arm, len(order)), one[0].arm, one[0].seed))
    loaded = [load_run(*one) for one in records]
    faults = tuple(fault for _, found in loaded for fault in found)
    by_task: dict[str, list[Run]] = {}
    for run, _ in loaded:
        by_task.setdefault(repr(run.record.task), []).append(run)
    # A folder has one student; where several tasks were put together, nothing says whose it is.
    shipped = read_shipped(layout) if len(by_task) == 1 else None
    experiments = []
    for runs in by_task.values():
        task, name = _task_of(runs[0]), runs[0].record.experiment or layout.root.name
        suffix = f": {task.name or ', '.join(task.label)}" if len(by_task) > 1 else ""
        experiments.append(Experiment(f"{name}{suffix}", task, layout.root, tuple(runs), faults, shipped))
    return experiments


def _records_of(layout: ExperimentLayout) -> list[tuple[RunRecord, RunLayout | Path]]:
    """Read the runs' own records; those in results.json where the folder of runs was not kept."""
    if not layout.root.is_dir():
        raise ArtifactError(f"{layout.root}: there is no such folder. Name the folder of an experiment (`--out`).")
    if paths := sorted(layout.runs.glob("*/run.json")):
        return [(read_record(path), RunLayout(path.parent)) for path in paths]
    if layout.results.is_file() and (records := read_results(layout.results)):
        return [(record, layout.results) for record in records]
    raise ArtifactError(
        f"{layout.root}: expected the folder of an experiment, with runs/<arm>-seed<k>/run.json, but found no record. "
        "Run the experiment first, or name its folder."
    )


def load_run(record: RunRecord, place: RunLayout | Path) -> tuple[Run, tuple[str, ...]]:
    """Read a run's predictions too, and say what could not be read; a file of records stands for a lost folder."""
    who = f"{record.arm}, seed {record.seed}"
    if isinstance(place, Path):
        return Run(record, place, None), (f"{who}: only results.json was kept, so there are no predictions",)
    if record.status != "finished":
        return Run(record, place.record, None), ()
    try:
        return Run(record, place.record, read_predictions(place.predictions)), ()
    except ArtifactError as error:
        reason = f"its predictions cannot be read ({error})"
        if not place.predictions.exists():
            reason = f"{place.predictions.name} is missing"
        return Run(record, place.record, None), (f"{who}: {reason}",)


def _task_of(run: Run) -> Task:
    try:
        return Task.from_dict(run.record.task)
    except DataError as error:
        raise ArtifactError(f"{run.path}: {error}. Delete the run's folder and run the same command again.") from None
