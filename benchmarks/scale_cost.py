"""What the paper's full grid costs on 8 GPUs and on 100 nodes: computed on paper, from parts that are measured.

    python benchmarks/scale_cost.py [--glue DIR] [--gpu-tflops 312] [--reached 0.3] [--overhead 6]

Counted exactly: the 2,619 runs of configs/paper.yaml, the parameters of the six models at their published sizes, the
rows of GLUE. Measured here: tokens a row on the GLUE files at hand, the seconds that the suite's queue spends per run
(records and tables written). Assumed, and named in the output: the GPU's speed, the share of it that training reaches,
the seconds of a run beyond its training, tokens a row of the tasks whose files are not at hand. The schedule is the
suite's own queue, whose jobs do nothing but let time pass, carried out by so many workers.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import command_line, tell_machine
from table2_models import SIZES, build_encoder

from kdlora.config import LORA_ARMS, TEACHER_ARMS
from kdlora.data.tasks import GLUE
from kdlora.defaults import FAMILIES
from kdlora.evidence.records import RunRecord, write_record
from kdlora.experiment.jobs import Job, Outcome
from kdlora.experiment.plan import Plan, make_plan
from kdlora.experiment.queue import Queue, finished_runs
from kdlora.experiment.recording import TaskFacts
from kdlora.experiment.settle import settings_for
from kdlora.experiment.suite_tables import write_tables
from kdlora.experiment.suitefile import load_suite
from kdlora.system.ownership import claim_folder

CONFIG = Path(__file__).parents[1] / "configs" / "paper.yaml"
ROWS = {"cola": 8551, "mnli": 392702, "mrpc": 3668, "qnli": 104743, "qqp": 363846, "rte": 2490, "sst2": 67349}
ROWS |= {"stsb": 5749, "wnli": 635}
"""Training rows of GLUE, as the benchmark publishes them."""
VALIDATION = {"cola": 1043, "mnli": 19647, "mrpc": 408, "qnli": 5463, "qqp": 40430, "rte": 277, "sst2": 872}
VALIDATION |= {"stsb": 1500, "wnli": 71}
TOKENS = {"cola": 11, "mnli": 39, "mrpc": 53, "qnli": 50, "qqp": 30, "rte": 70, "sst2": 13, "stsb": 31, "wnli": 37}
"""Mean tokens of a row, specials included; replaced by a count where the task's files are at hand."""
FEWEST = 8
Cost = Callable[[Job], float]


def parameters() -> dict[str, int]:
    """Count the parameters outside the embeddings of every model of the paper, by its name on the Hub."""
    found = {}
    for family, sizes in SIZES.items():
        for name, size in zip(FAMILIES[family], sizes, strict=True):  # type: ignore[index]
            named = build_encoder(size, device="meta").model.named_parameters()
            found[name] = sum(one.numel() for place, one in named if "embeddings" not in place)
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
            train = load_splits(TaskConfig(name=name), DataConfig(path=str(glue))).train
            rows = train.select(range(min(5000, len(train))))
            found[name] = round(statistics.mean(tokenise(rows, reader, 128).dataset["length"]), 1)
    return found


def cost_of_job(operations: float, overhead: float) -> Cost:
    """Say how long a job takes: a training with an evaluation after every epoch, or a pass over the rows to label."""
    sizes = parameters()

    def cost(job: Job) -> float:
        task = task_of(job)
        teaches = job.kind == "label" or job.arm in TEACHER_ARMS
        size = sizes[str(job.config.teacher.model if teaches else job.config.student.model)]
        rows: float = ROWS[task]
        if job.kind == "train":
            epochs = settings_for(job.config, job.arm).epochs or 1
            rows = rows * epochs * (2 if job.arm in LORA_ARMS else 3) + VALIDATION[task] * (epochs + 1)
        return overhead + 2.0 * size * TOKENS[task] * rows / operations

    return cost


def task_of(job: Job) -> str:
    """Name a job's task."""
    return job.key.split("/")[1]


def carry_out(plan: Plan, root: Path, workers: int, cost: Cost) -> dict[str, Any]:
    """Let the suite's queue give its jobs to so many workers, for which a clock runs that is not the machine's.

    With the fewest workers the records are written too, and the driver is timed.
    """
    driver = workers == FEWEST
    tasks = plan.suite.tasks
    facts = {task: TaskFacts(GLUE[task].task.to_dict(), {0: "rows"}, {"train": ROWS[task]}, ()) for task in tasks}
    claim_folder(root, "suite")
    start, runs = time.perf_counter(), plan.runs()
    queue = Queue(runs, plan.lessons(), root, facts, {})
    now, jobs, busy = 0.0, 0, Counter[str]()
    running: list[tuple[float, int, Job]] = []
    for number in itertools.count():
        job = queue.next_job() if len(running) < workers else None
        if job is not None:
            busy[task_of(job)] += cost(job)
            heapq.heappush(running, (now + cost(job), number, job))
            jobs += 1
        elif running:
            now, _, job = heapq.heappop(running)
            queue.take(_pretend(job, driver))
        else:
            break
    found = {"hours": now / 3600, "use": busy.total() / (now * workers)}
    if not driver:
        return found
    found |= {"driver_ms_a_job": 1000 * (time.perf_counter() - start) / jobs}
    start = time.perf_counter()
    Queue(runs, plan.lessons(), root, facts, finished_runs(runs, root, facts))
    found |= {"resume_seconds": time.perf_counter() - start}
    start = time.perf_counter()
    write_tables(plan, root, queue.records)
    found |= {"tables_seconds": time.perf_counter() - start}
    return found | {"hours_by_task": {task: round(seconds / 3600, 1) for task, seconds in busy.items()}}


def _pretend(job: Job, writes: bool) -> Outcome:
    """Make the record that a job would leave."""
    if job.kind == "label":
        return Outcome(job, None, None, 0.0)
    score = 50.0 + hash((job.key, job.seed)) % 1000 / 100
    record = RunRecord(
        experiment=job.config.title(),
        task=job.facts.task,
        arm=job.arm,
        seed=job.seed,
        status="finished",
        model="model",
        score=score,
        metrics=dict.fromkeys(job.facts.task["metrics"], score / 100),
        history=[{"epoch": float(epoch), "score": score} for epoch in range(1, 4)],
        fingerprints={"data": "rows", "taught_by": job.teacher},
        finished="2026-01-01T00:00:00+00:00",
        config=job.config.model_dump(mode="json"),
    )
    if job.arm == "fft":
        job.layout.teacher.mkdir(parents=True, exist_ok=True)
    if writes:
        write_record(job.layout.run(job.arm, job.seed).record, record)
    return Outcome(job, record, None, 0.0)


def main(options: argparse.Namespace) -> None:
    """Carry the plan out on paper at each size."""
    plan = make_plan(load_suite(CONFIG))
    if options.glue is not None:
        TOKENS.update(count_tokens(options.glue, options.tokenizer))
    print(f"{len(plan.runs()):,} runs; tokens a row: {TOKENS}")
    print({name: f"{count / 1e6:.1f} M" for name, count in parameters().items()})
    print(f"assumed: {options.gpu_tflops:g} TFLOP/s x {options.reached:g} reached, {options.overhead:g} s beside a run")
    cost = cost_of_job(options.gpu_tflops * 1e12 * options.reached, options.overhead)
    for name, workers in (
        ("8 GPUs", FEWEST),
        ("100 nodes of 1 GPU", 100),
        ("100 nodes of 8 GPUs", 800),
        ("any", 10_000),
    ):
        with tempfile.TemporaryDirectory() as folder:
            found = carry_out(plan, Path(folder, "suite"), workers, cost)
        print(name, {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()})
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__)
    parser.add_argument("--glue", type=Path, help="GLUE files, to count tokens on")
    parser.add_argument("--tokenizer", default="bert-base-uncased", help="Hub id or folder")
    parser.add_argument("--gpu-tflops", type=float, default=312.0, help="of an A100 in bf16, by its data sheet")
    parser.add_argument("--reached", type=float, default=0.3, help="share of it that training reaches: an assumption")
    parser.add_argument("--overhead", type=float, default=6.0, help="seconds of a run beyond training and evaluation")
    main(parser.parse_args())
