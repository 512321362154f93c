"""Read experiment folders back: records, predictions, texts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from kdlora.config import ARMS
from kdlora.configfile import load_config
from kdlora.data.tasks import Task
from kdlora.errors import ArtifactError, DataError, KdLoraError
from kdlora.evidence.metrics import check_arrays
from kdlora.evidence.predictions import ExampleText, Predictions, read_examples, read_predictions
from kdlora.evidence.records import ExperimentLayout, RunLayout, RunRecord, read_record
from kdlora.evidence.stats import MeanSd, mean_sd
from kdlora.foreign import read_json
from kdlora.report.findings import Choice, choose_student, is_teacher_given, read_choice
from kdlora.report.page import Link
from kdlora.report.shipped import Shipped, read_shipped
from kdlora.system.ownership import refuse_links


@dataclass(frozen=True)
class Run:
    """One run as it lies on disk: figures link to the `path` of its record, and a `fault` says what cannot be read."""

    record: RunRecord
    path: Path
    predictions: Predictions | None = None
    fault: str = ""

    def score(self, split: str) -> float | None:
        return self.record.test_score if split == "test" else self.record.score

    def metrics(self, split: str) -> dict[str, float | None]:
        return self.record.test_metrics if split == "test" else self.record.metrics


@dataclass(frozen=True)
class Experiment:
    """One experiment: arms × seeds on one task, and figures of the exported student, for a report in a folder."""

    name: str
    task: Task
    layout: ExperimentLayout
    runs: tuple[Run, ...]
    shipped: Shipped
    base: Path

    @property
    def arms(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(run.record.arm for run in self.runs))

    @cached_property
    def split(self) -> str:
        return headline_split(run.record for run in self.runs)

    def finished(self, arm: str) -> tuple[Run, ...]:
        own = (run for run in self.runs if run.record.arm == arm and run.record.status == "finished")
        scored = tuple(run for run in own if run.score(self.split) is not None)
        # Nothing of these is random; where another seed came first, there is the same once more.
        return scored[:1] if arm == "words" or (arm == "fft" and is_teacher_given(self.runs)) else scored

    @property
    def unfinished(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.record.status != "finished")

    def score(self, arm: str) -> MeanSd | None:
        return mean_sd(run.score(self.split) for run in self.finished(arm))

    def predictions(self, arm: str) -> list[Predictions]:
        return [run.predictions.only(self.split) for run in self.finished(arm) if run.predictions is not None]

    @property
    def is_shipped(self) -> bool:
        return self.layout.shipped.exists() or self.layout.student.exists()  # version 0.1 wrote no shipped.json

    @cached_property
    def choice(self) -> Choice | None:
        """What was shipped; where nothing was yet, what would be."""
        recorded = read_choice(self.layout.shipped)
        if recorded is not None and self.finished(recorded.arm):
            return recorded
        return choose_student(self.task, [run for run in self.runs if run.score(self.split) is not None])

    @property
    def teacher_arm(self) -> str:
        """The arm that teaches: `fft`, or `lora` where the teacher is tuned by adapters."""
        return self.runs[0].record.teacher_arm

    @property
    def teacher_predictions(self) -> Predictions | None:
        """What the students' teacher predicted on the headline's split, where it was kept; else another of its arm."""
        known = [run for run in self.finished(self.teacher_arm) if run.predictions is not None]
        seeds = [(run.record.config.get("teacher") or {}).get("seed") for run in known]
        if seeds and seeds[0] is None:
            seeds = (known[0].record.config.get("run") or {}).get("seeds") or seeds
        run = next((one for one in known if one.record.seed == seeds[0]), next(iter(known), None))
        return None if run is None or run.predictions is None else run.predictions.only(self.split)

    @property
    def student_arm(self) -> str | None:
        return None if self.choice is None else self.choice.arm

    @cached_property
    def shows_paper(self) -> bool:
        try:
            return load_config(self.layout.config).report.paper
        except (KdLoraError, OSError):
            return False

    @cached_property
    def seen(self) -> int:
        """How many texts of the headline's split are training texts too, as the plan counted them; 0 without a plan."""
        try:
            return int(read_json(self.layout.plan)["duplicates"][f"train and {self.split}"])
        except (ArtifactError, KeyError, TypeError, ValueError, OverflowError):
            return 0

    @cached_property
    def examples(self) -> dict[tuple[str, str], ExampleText]:
        try:
            return read_examples(self.layout.examples)
        except ArtifactError:
            return {}

    def href(self, path: Path) -> str:
        """Give a link that works from the folder in which the report lies."""
        try:
            return quote(Path(os.path.relpath(path.resolve(), self.base.resolve())).as_posix())
        except ValueError:  # on another drive of Windows
            return path.resolve().as_uri()

    def links(self, runs: Sequence[Run]) -> tuple[Link, ...]:
        told = ((run, run.record) for run in runs)
        return tuple(Link(str(one.seed), self.href(run.path), f"{one.arm}, seed {one.seed}") for run, one in told)


def headline_split(records: Iterable[RunRecord]) -> str:
    """Choose the split of the headline: test where every finished run with a score has it, else validation.

    A table of a teacher's outputs may cover validation alone, which hides nobody else's test score.
    """

    def is_table(one: RunRecord) -> bool:
        teacher = one.config.get("teacher") or {}
        return one.arm == "fft" and bool(teacher.get("logits") or teacher.get("probabilities"))

    finished = [one for one in records if one.status == "finished" and not is_table(one)]
    scored = [one for one in finished if one.score is not None or one.test_score is not None]
    return "test" if scored and all(one.test_score is not None for one in scored) else "validation"


def load_experiment(folder: Path, base: Path | None = None) -> Experiment:
    """Read an experiment, for a report in the folder `base`, by default its own."""
    layout = ExperimentLayout(folder)
    order: dict[str, int] = {arm: place for place, arm in enumerate(ARMS)}
    found = sorted(layout.runs.glob("*/run.json"))
    if not found:
        raise ArtifactError(
            f"{layout.root}: expected the folder of an experiment, with runs/<arm>-seed<k>/run.json, but found no "
            "record. Run the experiment first, or name its folder."
        )
    refuse_links(layout.root)
    records = [(read_record(path), RunLayout(path.parent)) for path in found]
    records.sort(key=lambda one: (order.get(one[0].arm, len(order)), one[0].arm, one[0].seed))
    runs = tuple(load_run(*one) for one in records)
    tasks = [_task_of(run) for run in runs]
    if any(task != tasks[0] for task in tasks):
        raise ArtifactError(f"{layout.root}: its runs are of different tasks; keep each task in a folder of its own")
    name = records[0][0].experiment or layout.root.name
    return Experiment(name, tasks[0], layout, runs, read_shipped(layout), base or folder)


def load_run(record: RunRecord, place: RunLayout) -> Run:
    kept = place.predictions.exists() or any(path.endswith(place.predictions.name) for path in record.files)
    if record.status != "finished" or not kept:
        return Run(record, place.record)
    try:
        found, task = read_predictions(place.predictions), Task.from_dict(record.task)
        if found.label_names != task.label_names:
            raise ValueError("their labels are not those of the run")
        check_arrays(task, found.logits, found.labels, found.offsets)
        return Run(record, place.record, found)
    except (KdLoraError, ValueError, IndexError, TypeError) as error:
        told = str(error).replace(str(place.predictions), place.predictions.name)  # the report may travel
        fault = f"{record.arm}, seed {record.seed}: its predictions cannot be read ({told})"
        return Run(record, place.record, fault=fault)


def load_single_run(place: RunLayout, base: Path) -> Experiment:
    refuse_links(place.root)
    run = load_run(read_record(place.record), place)
    name = f"{run.record.experiment}: {place.root.name}"
    return Experiment(name, _task_of(run), ExperimentLayout(place.root.parent.parent), (run,), Shipped(), base)


def _task_of(run: Run) -> Task:
    try:
        return Task.from_dict(run.record.task)
    except DataError as error:
        raise ArtifactError(f"{run.path}: {error}. Delete the run's folder and run the same command again.") from None
