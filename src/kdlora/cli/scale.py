"""The verbs that carry out many runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdlora.cli.app import Json, Set, app, print_json, print_table, verb
from kdlora.terminal import SafeConsole, draw_bars

if TYPE_CHECKING:
    from kdlora.experiment.search import SearchEvent, SearchResult
    from kdlora.experiment.suite import Overview, SuiteEvent, SuiteResult

On = Annotated[
    str | None, typer.Option("--on", metavar="ray[://HOST:PORT]", help="Carry the runs out on a Ray cluster.")
]
SuiteOut = Annotated[str | None, typer.Option("--out", help="Folder of the suite; default runs/<name>.")]
SuiteSet = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the suite (seeds=[0], config.run.threads=1)."),
]
Yes = Annotated[bool, typer.Option("--yes", help="Carry out a plan of more than 10,000 runs.")]


@app.command()
def suite(
    suite_file: Annotated[Path, typer.Argument(metavar="SUITE.yaml", help="Suite file.")],
    out: SuiteOut = None,
    overrides: SuiteSet = None,
    on: On = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and an estimate of time.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Carry out tasks x families x arms x configurations x seeds, and write the paper's tables.

    The same command again repeats no finished run, and tries failed ones again.

    Example: kdlora suite configs/paper-small.yaml --dry-run

    Example: kdlora suite configs/paper.yaml --set families=[bert] --set config.data.path=/data/glue
    """
    from kdlora.experiment.suitefile import load_suite
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("suite")
    wanted = load_suite(suite_file, overrides or [])
    if dry_run:
        from kdlora.experiment.suite import look_at_suite

        prepare_children("kdlora.experiment.jobs")
        overview = look_at_suite(wanted, out, confirmed=yes)
        print_json(asdict(overview)) if as_json else _print_overview(overview)
        return
    if on is None:
        prepare_children("kdlora.experiment.jobs")
    from kdlora.experiment.suite import run_suite

    with _suite_progress() as listen:
        result = run_suite(wanted, out, on=on, confirmed=yes, listen=listen)
    print_json(result.to_dict()) if as_json else _print_suite(result)
    raise typer.Exit(1 if result.failed else 0)


@dataclass(frozen=True)
class Search:
    """What `kdlora search` is told."""

    config: Annotated[Path, typer.Argument(help="Config file (YAML), with a section `search` or with --space.")]
    space: Annotated[Path | None, typer.Option(help="YAML file with the space: config key to values or range.")] = None
    trials: Annotated[int | None, typer.Option(help="Trainings in all, whichever process carries them out.")] = None
    storage: Annotated[
        str | None, typer.Option(help="Journal file, SQLite file or database URL; default: a journal in --out.")
    ] = None
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the search; default runs/<name>-search.")] = None
    overrides: Set = None
    on: On = None
    as_json: Json = False


@verb(Search)
def search(options: Search) -> None:
    """Search fields of a config for the best score on held-out training rows.

    The same command again goes on; started several times at once, the processes share the trials.

    Example: kdlora search configs/mrpc.yaml --space space.yaml --trials 30

    Example: kdlora run runs/mrpc-search/best.yaml
    """
    from kdlora.configfile import load_search
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("search")
    if options.on is None:
        prepare_children("kdlora.experiment.trial")
    from kdlora.experiment.search import run_search

    wanted, settings = load_search(options.config, options.overrides or [], space=options.space, trials=options.trials)
    with _search_progress() as listen:
        result = run_search(wanted, settings, options.out, storage=options.storage, on=options.on, listen=listen)
    print_json(asdict(result)) if options.as_json else _print_search(result)
    raise typer.Exit(0 if result.score is not None else 1)


@contextlib.contextmanager
def _suite_progress() -> Iterator[Callable[[SuiteEvent], None]]:
    """Draw one bar for the suite; where standard error is no terminal, a line for each run that ends."""
    with draw_bars() as show:

        def listen(event: SuiteEvent) -> None:
            if show is not None:
                failed = f"  {event.failed} failed" if event.failed else ""
                show("runs", event.done, event.total, f"{event.done}/{event.total}{failed}{_job_status(event)}")
            elif line := _ended(event):
                SafeConsole(stderr=True).tell(line)

        yield listen


def _job_status(event: SuiteEvent) -> str:
    if event.job is None:
        return ""
    epoch, score = (getattr(event.detail, name, None) for name in ("epoch", "score"))
    parts = ["/".join(event.job.key.split("/")[1:3])]
    parts += [] if epoch is None else [f"epoch {epoch:.1f}"]
    parts += [f"score {score:.1f}"] if score else []
    return "  " + "  ".join(parts)


def _ended(event: SuiteEvent) -> str:
    """Say how a job ended; empty where it has not."""
    from kdlora.experiment.jobs import Outcome

    outcome = event.detail
    if not isinstance(outcome, Outcome):
        return ""
    result = f"failed: {outcome.error}" if outcome.error else "labelled"
    if outcome.record is not None and outcome.record.score is not None:
        result = f"score {outcome.record.score:.2f}"
    return f"{event.done}/{event.total}  {outcome.job.key}  {result}  {outcome.seconds:.1f} s"


def _print_overview(overview: Overview) -> None:
    tasks = list(dict.fromkeys(one.task for one in overview.arms))
    arms = list(dict.fromkeys(one.arm for one in overview.arms))
    left = {(one.task, one.arm): f"{one.runs - one.finished} of {one.runs}" for one in overview.arms}
    rows = [(task, *(left.get((task, arm), "–") for arm in arms)) for task in tasks]
    print_table(("task", *arms), rows, title="runs that are left, of those planned")
    console = SafeConsole()
    counts = f"{overview.runs:,} runs, {overview.finished:,} of them finished"
    console.print(f"{counts}; {overview.labellings} teachers label their rows once")
    found = overview.estimate
    if found is None:
        console.print(f"no estimate of time: {overview.obstacle}", markup=False)
        return
    hours = f"{found.seconds / 3600:,.1f} hours" if found.seconds > 5400 else f"{found.seconds / 60:,.0f} minutes"
    basis = f"{found.measured:,} of {found.runs:,} runs from finished ones like them"
    if found.measured < found.runs:
        basis += ", the others from a few forward passes on this machine"
    console.print(f"about {hours} on this machine, one run at a time ({basis})")


def _print_suite(result: SuiteResult) -> None:
    console = SafeConsole()
    finished = sum(record.status == "finished" for record in result.records.values())
    console.print(f"{finished:,} runs finished, {result.reused:,} of them before; {len(result.failed):,} failed")
    for record in result.failed[:20]:
        console.tell(f"failed: {record.experiment}, {record.arm}, seed {record.seed}: {record.error}", style="red")
    if len(result.failed) > 20:
        console.tell(f"and {len(result.failed) - 20:,} more, all in {result.tables[1]}")
    for path in result.tables:
        console.tell(str(path))


@contextlib.contextmanager
def _search_progress() -> Iterator[Callable[[SearchEvent], None]]:
    """Draw one bar for the search; where standard error is no terminal, a line for each trial that ends."""
    with draw_bars() as show:

        def listen(event: SearchEvent) -> None:
            count = f"{event.done}/{event.trials}  "
            if show is not None:
                best = "" if event.best is None else f"best {event.best:.2f}  "
                epoch = getattr(event.detail, "epoch", None)
                now = f"trial {event.number}" + (f", epoch {epoch:.1f}" if epoch is not None else "")
                show("trials", event.done, event.trials, count + best + now)
            elif isinstance(event.detail, str):
                SafeConsole(stderr=True).tell(f"{count}trial {event.number}  {event.detail}")

        yield listen


def _print_search(result: SearchResult) -> None:
    console = SafeConsole()
    console.print(f"{result.finished} trials finished, {result.pruned} pruned, {result.failed} failed")
    if result.score is not None:
        console.print(f"best {result.score:.2f} on the held-out rows")
    for key, value in result.best.items():
        console.tell(f"  {key}: {value}")
    for path in result.paths:
        console.tell(str(path))
