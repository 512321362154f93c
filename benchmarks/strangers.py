"""Measure what a stranger gets: data sets x pairs of models, and nothing set but data, models, arms and seeds.

    python benchmarks/strangers.py prepare --data SHARED --models DIR --out OUT
    python benchmarks/strangers.py run --out OUT [--sets NAME ...] [--pairs NAME ...] [--minutes 30]
    python benchmarks/strangers.py report --out OUT
    python benchmarks/strangers.py keep --out OUT --to DIR

`prepare` writes the sets that the plan (strangers.yaml, or --plan FILE) declares as CSV and JSON Lines, and the plan
beside them. `run` carries out what is not finished, the cheapest sets first; after --minutes it stops, in the middle of
a training too, which goes on from there next time; the exit code is 75 if work is left, 1 if an experiment failed.
Several processes may share one --out. Of a finished experiment records, predictions and the teacher stay, other weights
go (not with --keep). A changed product wants another --out: its figures are not to be mixed with these.
`keep` copies what `report` reads, predictions included, which is little.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from harness import command_line
from strangers_data import write_sets
from strangers_plan import Job, Plan, configure, plan_jobs, read_plan

from kdlora import KdLoraError, run_experiment
from kdlora.evidence.records import ExperimentLayout
from kdlora.system.storage import write_json_atomic

UNFINISHED = 75
"""The conventional exit code for a temporary failure: run the same command again."""


class TimeIsUp(KeyboardInterrupt):
    """The minutes are over; for the product it is Ctrl-C, so a training leaves a checkpoint."""


@dataclass(frozen=True)
class Workshop:
    """A prepared folder: what is measured, and where the pretrained encoders lie."""

    out: Path
    plan: Plan
    models: Path

    def folder(self, job: Job, suffix: str = "") -> Path:
        """Name the experiment's folder, or a file beside it."""
        return self.out / "runs" / (job.name + suffix)

    def state(self, job: Job) -> dict[str, Any]:
        """Say how far an experiment is; `seconds` counts every attempt."""
        file = self.folder(job, ".json")
        return json.loads(file.read_text()) if file.exists() else {"finished": False, "seconds": 0.0}

    def cost(self, job: Job) -> int:
        """Compare sets by training text and teacher, so that the cheapest come first."""
        pair, dataset = self.plan.pairs[job.pair], self.plan.sets[job.dataset]
        train = self.out / "data" / job.dataset / dataset.train_file(dataset.limit(pair.rows))
        weights = sum(file.stat().st_size for file in (self.models / pair.teacher).glob("*.safetensors"))
        return train.stat().st_size * weights


def prepare(options: argparse.Namespace) -> int:
    """Write the sets, and the plan that holds from now on."""
    plan = read_plan(options.plan)
    declared, kept = options.plan.read_text(encoding="utf-8"), options.out / "strangers.yaml"
    if kept.exists() and (options.out / "runs").exists() and kept.read_text(encoding="utf-8") != declared:
        raise SystemExit(f"{options.out} has runs of another plan; name another --out")
    write_sets(plan, (options.data, options.models), options.out / "data")
    write_json_atomic(options.out / "models.json", str(options.models.resolve()))
    kept.write_text(declared, encoding="utf-8")
    return 0


def open_workshop(out: Path) -> Workshop:
    """Read a prepared folder."""
    if not (out / "strangers.yaml").exists():
        raise SystemExit(f"{out} is not prepared; run: strangers.py prepare --data ... --models ... --out {out}")
    models = json.loads((out / "models.json").read_text(encoding="utf-8"))
    return Workshop(out, read_plan(out / "strangers.yaml"), Path(models))


def run(options: argparse.Namespace) -> int:
    """Do what is not finished until the time is over; return the exit code."""
    shop, end = open_workshop(options.out), time.monotonic() + 60 * options.minutes
    for what, known in (("sets", shop.plan.sets), ("pairs", shop.plan.pairs), ("settings", shop.plan.settings)):
        if unknown := set(getattr(options, what) or ()) - set(known):
            raise SystemExit(f"--{what}: no {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    asked = [(options.pairs, "pair"), (options.sets, "dataset"), (options.settings, "settings")]
    jobs = [
        job for job in plan_jobs(shop.plan) if all(not names or getattr(job, field) in names for names, field in asked)
    ]
    failed = left = False
    for job in sorted(jobs, key=shop.cost):
        shop.folder(job).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout), FileLock(shop.folder(job, ".lock")).acquire(timeout=0):
            if not shop.state(job)["finished"] and time.monotonic() < end:
                failed |= not carry_out(shop, job, end, options.keep)
        left |= not shop.state(job)["finished"]
    print("work is left; run the same command again" if left else "all is done", flush=True)
    return 1 if failed else UNFINISHED if left else 0


@contextlib.contextmanager
def stopped_at(end: float) -> Iterator[None]:
    """Interrupt the block when the time is over."""

    def stop(number: int, frame: object) -> None:
        raise TimeIsUp

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(max(end - time.monotonic(), 0.001), 1e8))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def carry_out(shop: Workshop, job: Job, end: float, keep: bool) -> bool:
    """Run an experiment until it is finished or the time is over; return whether nothing failed."""
    start, state, folder = time.monotonic(), shop.state(job), shop.folder(job)
    faults: list[str] = []
    print(f"{job.name} ...", flush=True)
    try:
        with stopped_at(end):
            result = run_experiment(configure(shop.plan, job, shop.out, shop.models), folder)
        faults = [f"{record.arm} with seed {record.seed}: {record.error}" for record in result.failed]
        shipped = result.shipped and [result.shipped.arm, result.shipped.seed]
        state |= {"finished": not faults, "shipped": shipped}
    except TimeIsUp:
        pass
    except KdLoraError as error:
        faults = [str(error)]
    state["seconds"] += time.monotonic() - start
    write_json_atomic(shop.folder(job, ".json"), state)
    if state["finished"] and not keep:
        remove_weights(ExperimentLayout(folder))
    print(f"{job.name}: {state['seconds']:.0f} s{'' if state['finished'] else ', not finished'}", *faults, sep="\n  ")
    return not faults


def remove_weights(layout: ExperimentLayout) -> None:
    """Remove what no figure is read from; the teacher may teach other settings."""
    kept_by_runs = [place / name for place in layout.runs.iterdir() for name in ("model", "adapter")]
    for folder in (layout.student, layout.onnx, layout.adapter, *kept_by_runs):
        shutil.rmtree(folder, ignore_errors=True)


def report(options: argparse.Namespace) -> int:
    """Print the tables of what is finished."""
    from strangers_report import collect, render

    shop = open_workshop(options.out)
    states = {job: shop.state(job) for job in plan_jobs(shop.plan)}
    print(render(shop.plan, collect(shop.plan, shop.out, states, options.draws)))
    return 0


def keep(options: argparse.Namespace) -> int:
    """Copy what tables are made of, without models and texts."""
    runs = "runs/*/*/*"
    for pattern in ("*.*", f"{runs}.json", f"{runs}/results.json", f"{runs}/runs/*/predictions.parquet"):
        for file in options.out.glob(pattern):
            place = options.to / file.relative_to(options.out)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
    return 0


def read_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = command_line(__doc__)
    verbs = parser.add_subparsers(required=True)
    places: dict[str, Any] = {"type": Path, "required": True}
    verbs_and_places = (
        (prepare, ("data", "models", "out")),
        (run, ("out",)),
        (report, ("out",)),
        (keep, ("out", "to")),
    )
    for action, names in verbs_and_places:
        verb = verbs.add_parser(action.__name__)
        verb.set_defaults(action=action)
        for name in names:
            verb.add_argument(f"--{name}", **places)
        if action is prepare:
            verb.add_argument("--plan", type=Path, default=Path(__file__).with_suffix(".yaml"))
        elif action is run:
            for name in ("sets", "pairs", "settings"):
                verb.add_argument(f"--{name}", nargs="+")
            verb.add_argument("--minutes", type=float, default=1e6)
            verb.add_argument("--keep", action="store_true", help="keep all weights")
        elif action is report:
            verb.add_argument("--draws", type=int, default=2_000)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = read_options()
    sys.exit(chosen.action(chosen))
