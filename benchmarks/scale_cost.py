"""What the paper's full grid costs on 8 GPUs and on 100 nodes: computed on paper, from parts that are measured.

    python benchmarks/scale_cost.py [--glue DIR] [--gpu-tflops 312] [--reached 0.3] [--overhead 6]

Counted exactly: the 2,619 runs of configs/paper.yaml, the parameters of the six models at their published sizes, the
rows of GLUE. Measured here: tokens a row on the GLUE files at hand, the seconds that the suite's driver spends per run
(a course of all runs whose jobs do nothing, records and tables written). Assumed, and named in the output: the GPU's
speed, the share of it that training reaches, the seconds of a run beyond its training, tokens a row of the tasks whose
files are not at hand. The schedule is the suite's own order, carried out by so many workers.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from table2_models import SIZES, build_encoder

from kdlora.config import DISTILLED_ARMS, LORA_ARMS, TEACHER_ARMS
from kdlora.data.tasks import GLUE
from kdlora.evidence.records import RunRecord, write_record
from kdlora.experiment.jobs import Job, Outcome, TaskFacts
from kdlora.experiment.plan import Plan, PlannedRun, make_plan
from kdlora.experiment.queue import Queue, finished_runs
from kdlora.experiment.settle import settings_for
from kdlora.experiment.suite_tables import write_tables
from kdlora.experiment.suitefile import load_suite
from kdlora.system.environment import collect_versions, describe_machine

CONFIG = Path(__file__).parents[1] / "configs" / "paper.yaml"
ROWS = {
    "cola": 8551,
    "mnli": 392702,
    "mrpc": 3668,
    "qnli": 104743,
    "qqp": 363846,
    "rte": 2490,
    "sst2": 67349,
    "stsb": 5749,
    "wnli": 635,
}
"""Training rows of GLUE, as the benchmark publishes them."""
VALIDATION = {"cola": 1043, "mnli": 19647, "mrpc": 408, "qnli": 5463, "qqp": 40430, "rte": 277, "sst2": 872}
VALIDATION |= {"stsb": 1500, "wnli": 71}
TOKENS = {"cola": 11, "mnli": 39, "mrpc": 53, "qnli": 50, "qqp": 30, "rte": 70, "sst2": 13, "stsb": 31, "wnli": 37}
"""Mean tokens of a row, specials included; replaced by a count where the task's files are at hand."""
WEIGHT_BYTES = 4


@dataclass(frozen=True)
class Machine:
    """What runs one run.

    Attributes:
        operations: per second that a training reaches.
        overhead: seconds of a run beyond training and evaluation.
        driver: seconds that the driver spends for each run, one after the other.
    """

    operations: float
    overhead: float
    driver: float


def parameters() -> dict[tuple[str, str], int]:
    """Count the parameters outside the embeddings, for the teacher and the student of each family."""
    found = {}
    for family, sizes in SIZES.items():
        for role, size in zip(("teacher", "student"), sizes, strict=True):
            model = build_encoder(size, device="meta").model
            named = model.named_parameters()
            found[family, role] = sum(one.numel() for name, one in named if "embeddings" not in name)
    return found


def count_tokens(glue: Path, tokenizer: str) -> dict[str, float]:
    """Count the mean tokens of a training row, at most 128, on the files that are there."""
    from transformers import AutoTokenizer

    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.batches import tokenise
    from kdlora.data.load import load_splits

    reader, found = AutoTokenizer.from_pretrained(tokenizer), {}
    for name in ROWS:
        if (glue / GLUE[name].folder / "train.tsv").exists():
            splits = load_splits(TaskConfig(name=name), DataConfig(path=str(glue)))
            rows = splits.train.select(range(min(5000, len(splits.train))))
            found[name] = statistics.mean(tokenise(rows, reader, 128).dataset["length"])
    return found


def seconds(run: PlannedRun, family: str, sizes: dict[tuple[str, str], int], machine: Machine) -> float:
    """Give the time of one run: its training, an evaluation after every epoch, and what is beside them."""
    size = sizes[family, "teacher" if run.arm in TEACHER_ARMS else "student"]
    settings = settings_for(run.config, run.arm)
    passes = 2 if run.arm in LORA_ARMS else 3
    of_rows = ROWS[run.task] * settings.epochs * passes + VALIDATION[run.task] * (settings.epochs + 1)
    return machine.overhead + 2.0 * size * TOKENS[run.task] * of_rows / machine.operations


def labelling(task: str, family: str, sizes: dict[tuple[str, str], int], machine: Machine) -> float:
    """Give the time that a teacher takes to read its training rows once."""
    return machine.overhead + 2.0 * sizes[family, "teacher"] * TOKENS[task] * ROWS[task] / machine.operations


def simulate(plan: Plan, sizes: dict[tuple[str, str], int], machine: Machine, workers: int) -> dict[str, Any]:
    """Carry the plan out on paper: the suite's order, so many workers, one driver that hands runs out in turn."""
    family_of, costs = _family_of(plan), {}
    for run in plan.runs():
        costs[run.key] = seconds(run, family_of[run.key], sizes, machine)
    groups = {key: {one.key for one in group} for key, group in plan.teachers.items()}
    students: dict[tuple[str, str], list[PlannedRun]] = {key: [] for key in groups}
    order = {task: place for place, task in enumerate(plan.suite.tasks)}
    queue: list[tuple[int, int, str, float]] = []
    for number, run in enumerate(plan.runs()):
        if run.arm in DISTILLED_ARMS:
            students[run.task, family_of[run.key]].append(run)
        else:
            queue.append((order[run.task], number, run.key, costs[run.key]))
    heapq.heapify(queue)
    now, busy, running, next_number = 0.0, 0.0, [], len(costs)
    longest = max(costs.values())
    while queue or running:
        while queue and len(running) < workers:
            _, _, key, cost = heapq.heappop(queue)
            now += machine.driver  # the driver hands out one after the other
            heapq.heappush(running, (now + cost, key))
            busy += cost
        ended, key = heapq.heappop(running)
        now = max(now, ended)
        for (task, family), waiting in groups.items():
            if key == f"label {task} {family}":
                for run in students[task, family]:
                    next_number += 1
                    heapq.heappush(queue, (order[task], next_number, run.key, costs[run.key]))
            elif key in waiting:
                waiting.remove(key)
                if not waiting:
                    cost = labelling(task, family, sizes, machine)
                    heapq.heappush(queue, (order[task], -1, f"label {task} {family}", cost))
    return {
        "hours": now / 3600,
        "worker_hours": busy / 3600,
        "use": busy / (now * workers),
        "longest_run_hours": longest / 3600,
        "chain_hours": _longest_chain(plan, family_of, costs, sizes, machine) / 3600,
        "driver_hours": machine.driver * len(costs) / 3600,
    }


def _family_of(plan: Plan) -> dict[str, str]:
    found: dict[str, str] = {}
    for cell in plan.cells:
        for run in (*cell.runs, *plan.teachers.get((cell.task, cell.family), ())):
            found.setdefault(run.key, cell.family)
    return found


def _longest_chain(
    plan: Plan, family_of: dict[str, str], costs: dict[str, float], sizes: Any, machine: Machine
) -> float:
    """Find the longest teacher, labelling and student one after the other: no number of nodes is faster."""
    chains = []
    for (task, family), teachers in plan.teachers.items():
        taught = [costs[run.key] for run in plan.cells_of(task, family)["kd-lora"].runs]
        longest = max(costs[one.key] for one in teachers)
        chains.append(longest + labelling(task, family, sizes, machine) + max(taught))
    return max(chains)


def measure_driver(plan: Plan) -> dict[str, float]:
    """Carry the whole plan out with jobs that do nothing but write a record, and write the tables."""
    facts = {
        task: TaskFacts(GLUE[task].task.to_dict(), "rows", {"train": ROWS[task]}, 50.0, ()) for task in plan.suite.tasks
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        start = time.perf_counter()
        runs, lessons = plan.runs(), plan.lessons()
        course = Queue(runs, lessons, root, facts, {})
        jobs = 0
        while (job := course.next_job()) is not None:
            course.take(_pretend(job))
            jobs += 1
        carried = time.perf_counter() - start
        start = time.perf_counter()
        Queue(runs, lessons, root, facts, finished_runs(runs, root, facts))
        resumed = time.perf_counter() - start
        start = time.perf_counter()
        write_tables(plan, root, course.records)
        written = time.perf_counter() - start
    return {"jobs": jobs, "seconds_per_job": carried / jobs, "resume_seconds": resumed, "tables_seconds": written}


def _pretend(job: Job) -> Outcome:
    if job.kind == "label":
        return Outcome(job, None, None, 0.0)
    score = 50.0 + hash((job.key, job.seed)) % 1000 / 100
    metrics = dict.fromkeys(job.facts.task["metrics"], score / 100)
    record = RunRecord(
        experiment=job.config.title(),
        task=job.facts.task,
        arm=job.arm,
        seed=job.seed,
        status="finished",
        model="model",
        score=score,
        metrics=metrics,
        history=[{"epoch": float(epoch), "score": score} for epoch in range(1, 4)],
        fingerprints={"data": "rows", "taught_by": job.teacher},
        finished="2026-01-01T00:00:00+00:00",
        config=job.config.model_dump(mode="json"),
    )
    if job.arm == "fft":
        job.layout.teacher.mkdir(parents=True, exist_ok=True)
    write_record(job.layout.run(job.arm, job.seed).record, record)
    return Outcome(job, record, None, 0.0)


def report(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts, carry the plan out on paper at each size, and print both."""
    plan, sizes = make_plan(load_suite(CONFIG)), parameters()
    if options.glue is not None:
        TOKENS.update({name: round(value, 1) for name, value in count_tokens(options.glue, options.tokenizer).items()})
    driver = measure_driver(plan)
    print(f"{len(plan.runs()):,} runs; tokens a row: {TOKENS}")
    print({f"{family} {role}": f"{count / 1e6:.1f} M" for (family, role), count in sizes.items()})
    print(
        f"driver, measured: {1000 * driver['seconds_per_job']:.1f} ms a run, "
        f"{driver['resume_seconds']:.1f} s to resume, {driver['tables_seconds']:.1f} s for the tables"
    )
    operations = options.gpu_tflops * 1e12 * options.reached
    machine = Machine(operations, options.overhead, driver["seconds_per_job"])
    print(f"assumed: {options.gpu_tflops:g} TFLOP/s x {options.reached:g} reached, {options.overhead:g} s beside a run")
    found: dict[str, Any] = {"driver": driver, "tokens": TOKENS, "by_task": _by_task(plan, sizes, machine)}
    for name, workers in (("8 GPUs", 8), ("100 nodes of 1 GPU", 100), ("100 nodes of 8 GPUs", 800)):
        found[name] = simulate(plan, sizes, machine, workers)
        shown = ", ".join(f"{key} {value:.2f}" for key, value in found[name].items())
        print(f"{name}: {shown}")
    print("GPU hours by task:", {task: round(value, 1) for task, value in found["by_task"].items()})
    adapters, teachers = _bytes(plan, sizes)
    print(f"kept: {adapters / 1e9:.1f} GB of adapters, {teachers / 1e9:.1f} GB of teachers")
    print(json.dumps({"machine": describe_machine(), "versions": collect_versions()}))
    return found


def _by_task(plan: Plan, sizes: dict[tuple[str, str], int], machine: Machine) -> dict[str, float]:
    family_of, hours = _family_of(plan), dict.fromkeys(plan.suite.tasks, 0.0)
    for run in plan.runs():
        hours[run.task] += seconds(run, family_of[run.key], sizes, machine) / 3600
    return hours


def _bytes(plan: Plan, sizes: dict[tuple[str, str], int]) -> tuple[float, float]:
    """Estimate what stays on disk: every adapter with its head, and one teacher a task and family."""
    adapters = 0.0
    for run in plan.runs():
        if run.arm in LORA_ARMS:
            layers = 12 if run.arm == "lora" else 6
            adapters += WEIGHT_BYTES * (2 * layers * run.config.lora.rank * 2 * 768 + 768 * 769)
    totals = {"bert": 110e6, "roberta": 125e6, "deberta-v3": 184e6}
    return adapters, sum(WEIGHT_BYTES * totals[family] for _, family in plan.teachers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue", type=Path, help="GLUE files, to count tokens on")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="Hub id or folder")
    parser.add_argument("--gpu-tflops", type=float, default=312.0, help="of an A100 in bf16, by its data sheet")
    parser.add_argument("--reached", type=float, default=0.3, help="share of it that training reaches: an assumption")
    parser.add_argument("--overhead", type=float, default=6.0, help="seconds of a run beyond training and evaluation")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    figures = report(chosen)
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=2), encoding="utf-8")
