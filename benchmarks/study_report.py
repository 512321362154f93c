"""The tables of a study, from its records: scores, gains with their intervals, what was tuned, and time."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from study_plan import Places, Side, Study, Work, all_seeds, choose_point, configure, grid_points, teacher_of, work_of

from kdlora.data.load import load_splits
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.stats import Difference, PairedArms, contrast, mean_sd
from kdlora.report.wording import INTERVALS


@dataclass
class Finished:
    """What a study has finished.

    Attributes:
        records: by key.
        sides: the work of each recipe's arm by task and seed, where it is finished.
        points: the tuned values of each recipe's arm.
        teachers: the teacher's record of each task.
    """

    records: dict[str, dict[str, Any]]
    sides: dict[Side, dict[tuple[str, int], Work]] = field(default_factory=dict)
    points: dict[Side, dict[str, Any]] = field(default_factory=dict)
    teachers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def seeds(self, side: Side, task: str) -> list[int]:
        """List the seeds that are finished."""
        return sorted(seed for name, seed in self.sides.get(side, {}) if name == task)

    def scores(self, side: Side, task: str) -> list[float]:
        """List the scores, seed by seed."""
        return [self.records[self.sides[side][task, seed].key]["score"] for seed in self.seeds(side, task)]

    def mean(self, side: Side, places: Sequence[tuple[str, int]]) -> float:
        """Take the mean over tasks of the means over seeds; some of what is finished, by task and seed."""
        scores: dict[str, list[float]] = {}
        for task, seed in places:
            scores.setdefault(task, []).append(self.records[self.sides[side][task, seed].key]["score"])
        return statistics.mean(statistics.mean(own) for own in scores.values())


def collect(study: Study, places: Places) -> Finished:
    """Find every finished training of the study."""
    texts = [path.read_text(encoding="utf-8") for path in places.out.glob("*/*.json")]
    found = Finished({record["key"]: record for record in map(json.loads, texts)})
    scores = {key: record["score"] for key, record in found.records.items()}
    for name, recipe in study.recipes.items():
        for arm in recipe.arms:
            point, _ = choose_point(study, places, name, arm, scores)
            if point is None:
                continue
            found.points[name, arm] = point
            work = [
                work_of(study, places, name, arm, point, task, seed)
                for task, seed in itertools.product(study.shown, all_seeds(study))
            ]
            found.sides[name, arm] = {(one.task, one.seed): one for one in work if one.key in scores}
            found.teachers |= {
                one.task: found.records[teacher_of(one).key] for one in work if teacher_of(one).key in scores
            }
    return found


def make_tables(study: Study, places: Places, draws: int) -> str:
    """Write the tables as Markdown."""
    found = collect(study, places)
    level = 1 - 0.05 / len(study.contrasts)
    lines = [*_score_table(study, found), "", *_share_table(found), *_tuned_table(study, found), ""]
    lines += _contrast_table(study, places, found, level, draws)
    lines += [
        "",
        f"Means over the tasks that both sides have; {draws} draws. Intervals at {100 * level:.2f}% each, 95% for all "
        f"{len(study.contrasts)} contrasts that the study declares (Bonferroni). {INTERVALS}",
    ]
    return "\n".join(lines)


def _score_table(study: Study, found: Finished) -> list[str]:
    tasks = study.shown
    lines = [f"| recipe | arm | {' | '.join(tasks)} | mean |", "|---" * (len(tasks) + 3) + "|"]
    teacher = [found.teachers[task]["score"] if task in found.teachers else None for task in tasks]
    lines.append(f"| teacher | `fft` | {' | '.join('–' if one is None else f'{one:.1f}' for one in teacher)} | |")
    for (name, arm), work in found.sides.items():
        if not work:
            continue
        cells = [_scores(found.scores((name, arm), task)) for task in tasks]
        done = len({task for task, _ in work})
        mean = f"{found.mean((name, arm), list(work)):.1f}" + (f" ({done} tasks)" if done < len(tasks) else "")
        lines.append(f"| {name} | `{arm}` | {' | '.join(cells)} | {mean} |")
    return lines


def _scores(values: Sequence[float]) -> str:
    if not values:
        return "–"
    found = mean_sd(values)
    return f"{found.mean:.1f} (n = 1)" if found.sd is None else f"{found.mean:.1f} ± {found.sd:.1f} (n = {found.n})"


def _share_table(found: Finished) -> list[str]:
    """Say what share of the scores of the teacher, and of adapters of its size, a recipe keeps on the mean.

    Both means are over the tasks that both have, and for adapters over the seeds that both have.
    """
    large = next((side for side, work in found.sides.items() if side[1] == "lora" and work), None)
    lines = ["| recipe | arm | share of the teacher | share of its size with adapters |", "|---" * 4 + "|"]
    for side, work in found.sides.items():
        taught = [place for place in work if place[0] in found.teachers]
        if not taught or side == large:
            continue
        teacher = statistics.mean(found.teachers[task]["score"] for task in {task for task, _ in taught})
        cells = [_share(taught, found.mean(side, taught) / teacher)]
        both = sorted(work.keys() & found.sides[large].keys()) if large else []
        cells.append(_share(both, found.mean(side, both) / found.mean(large, both)) if large and both else "–")
        lines.append(f"| {side[0]} | `{side[1]}` | {' | '.join(cells)} |")
    return [*lines, ""]


def _share(places: Sequence[tuple[str, int]], share: float) -> str:
    tasks = [task for task, _ in places]
    return f"{100 * share:.1f}% ({len(set(tasks))} tasks, n = {min(map(tasks.count, tasks))})"


def _tuned_table(study: Study, found: Finished) -> list[str]:
    lines = [
        "| recipe | arm | tuned, of how many points | trainable | training time of the reference |",
        "|---" * 5 + "|",
    ]
    for (name, arm), work in found.sides.items():
        if not work:
            continue
        point = found.points[name, arm]
        text = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in point.items()) or "nothing"
        trainable = next(found.records[one.key]["trainable"] for one in work.values())
        tries = len(grid_points(study, name, arm))
        lines.append(f"| {name} | `{arm}` | {text} ({tries}) | {trainable:,} | {_time(study, found, (name, arm))} |")
    return lines


def _time(study: Study, found: Finished, side: Side) -> str:
    """Compare training seconds with the reference's on the same tasks and seeds."""
    reference = (study.reference, "kd-lora")
    both = found.sides[side].keys() & found.sides.get(reference, {}).keys()
    if not both:
        return "–"
    mine, theirs = (
        sum(found.records[found.sides[one][place].key]["train_seconds"] for place in both) for one in (side, reference)
    )
    return f"{mine / theirs:.2f}"


def _contrast_table(study: Study, places: Places, found: Finished, level: float, draws: int) -> list[str]:
    lines = ["| contrast | points | interval | seeds | tasks |", "|---" * 5 + "|"]
    for sides in study.contrasts:
        difference, tasks = compare(study, places, found, sides, level, draws)
        cells = ["–"] * 4
        if difference is not None:
            seeds = str(difference.n_seeds) if difference.n_seeds > 1 else "one seed: no verdict"
            span = f"{difference.low:+.1f} to {difference.high:+.1f}"
            cells = [f"{difference.difference:+.1f}", span, seeds, str(len(tasks))]
        first, second = (f"{name} `{arm}`" for name, arm in sides)
        lines.append(f"| {first} − {second} | {' | '.join(cells)} |")
    return lines


def compare(
    study: Study, places: Places, found: Finished, sides: tuple[Side, Side], level: float, draws: int
) -> tuple[Difference | None, list[str]]:
    """Compare two sides on the tasks that both have, with the seeds that both have."""
    pairs, tasks = [], []
    for task in study.shown:
        seeds = sorted(set(found.seeds(sides[0], task)) & set(found.seeds(sides[1], task)))
        if not seeds:
            continue
        first, second = ([_predictions(places, found.sides[side][task, seed]) for seed in seeds] for side in sides)
        assert first[0].labels is not None
        logits = [[one.logits for one in arm] for arm in (first, second)]
        pairs.append(PairedArms(_task(places, study, task), first[0].labels, logits[0], logits[1]))
        tasks.append(task)
    if not pairs:
        return None, []
    return contrast(pairs, draws=draws, level=level), tasks


def _predictions(places: Places, work: Work) -> Predictions:
    return read_predictions(places.run(work).with_suffix(".parquet"))


_tasks: dict[str, Task] = {}


def _task(places: Places, study: Study, name: str) -> Task:
    if name not in _tasks:
        config = configure(study, places, name, study.reference, {})
        _tasks[name] = load_splits(config.task, config.data).task
    return _tasks[name]
