"""The verbs that carry out many runs or label many texts, and the one that answers over HTTP."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option

from kdlora.cli.app import IdColumn, Json, Set, Text, Threads, app, counting, print_json, print_table, verb
from kdlora.deploy import Runtime
from kdlora.errors import counted
from kdlora.terminal import SafeConsole, Show, draw_bars

if TYPE_CHECKING:
    from kdlora.deploy.tagger import Model
    from kdlora.experiment.search import SearchEvent
    from kdlora.experiment.suite import SuiteEvent, SuiteResult

_SET_HELP = "Set a key of the suite (seeds=[0], config.run.threads=1)."
On = Annotated[str | None, Option("--on", metavar="ray[://HOST:PORT]", help="Use a Ray cluster.")]


@app.command()
def suite(
    suite_file: Annotated[Path, Argument(metavar="SUITE.yaml", help="Suite file.")],
    out: Annotated[str | None, Option("--out", help="Folder of the suite. Default: runs/<name>.")] = None,
    overrides: Annotated[list[str] | None, Option("--set", metavar="KEY=VALUE", help=_SET_HELP)] = None,
    on: On = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Print the plan and the estimated time.")] = False,
    as_json: Json = False,
) -> None:
    """Run tasks x families x arms x configurations x seeds, and write the paper's tables.

    The same command continues: it repeats no finished run, and tries failed ones again.

    Example: kdlora suite configs/paper-small.yaml --dry-run

    Example: kdlora suite configs/paper.yaml --set 'families=[bert]' --set config.data.path=/data/glue
    """
    from kdlora.experiment.suitefile import load_suite
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("suite")
    wanted = load_suite(suite_file, overrides or [])
    if dry_run or on is None:
        prepare_children("kdlora.experiment.jobs")
    from kdlora.experiment.suite import look_at_suite, run_suite

    if dry_run:
        overview = look_at_suite(wanted, out)
        print_json(overview) if as_json else _print_overview(overview)
        raise Exit(2 if overview["obstacle"] else 0)
    with draw_bars() as show:
        result = run_suite(wanted, out, on=on, listen=lambda event: _show_suite(event, show))
    print_json(result.to_dict()) if as_json else _print_suite(result)
    raise Exit(1 if result.failed else 0)


@app.command()
def search(
    config: Annotated[Path, Argument(help="Config file (YAML) with a section `search`, or with --space.")],
    space: Annotated[Path | None, Option(help="YAML file with the values or range of each config key.")] = None,
    trials: Annotated[int | None, Option(help="Number of trainings, over all processes.")] = None,
    out: Annotated[Path | None, Option("--out", help="Folder of the search. Default: runs/<name>-search.")] = None,
    overrides: Set = None,
    on: On = None,
    as_json: Json = False,
) -> None:
    """Search the values of config keys that score best on held-out training rows.

    The same command continues. Several processes at once share the trials.

    Example: kdlora search configs/mrpc.yaml --space space.yaml --trials 30

    Example: kdlora run runs/mrpc-search/best.yaml
    """
    from kdlora.configfile import load_search
    from kdlora.system.children import prepare_children
    from kdlora.system.launch import check_alone

    check_alone("search")
    if on is None:
        prepare_children("kdlora.experiment.study")
    from kdlora.experiment.search import run_search

    wanted = load_search(config, overrides or [], space=space, trials=trials)
    with draw_bars() as show:
        result = run_search(*wanted, out, on=on, listen=lambda event: _show_search(event, show))
    if as_json:
        print_json(result)
    else:
        console = SafeConsole()
        console.print(f"{counted(result.finished, 'trial')} finished, {result.pruned} pruned, {result.failed} failed")
        if result.score is not None:
            console.print(f"best {result.score:.2f} on the held-out rows")
        for line in (*(f"  {key}: {value}" for key, value in result.best.items()), *map(str, result.paths)):
            console.tell(line)
    raise Exit(0 if result.score is not None else 1)


def _show_suite(event: SuiteEvent, show: Show) -> None:
    """Draw one bar for the suite; a log has a line for each run that ends."""
    from kdlora.experiment.jobs import Outcome

    job, detail, line = event.job, event.detail, ""
    if isinstance(detail, Outcome):
        result = f"failed: {detail.error}" if detail.error else "labelled"
        if detail.record is not None and detail.record.score is not None:
            result = f"score {detail.record.score:.2f}"
        line = f"{event.done}/{event.total}  {detail.job.key}  {result}  {detail.seconds:.1f} s"
    parts = [f"{event.done}/{event.total}", f"{event.failed} failed" if event.failed else ""]
    if job is not None:
        epoch, score = (getattr(detail, name, None) for name in ("epoch", "score"))
        parts += ["/".join(job.key.split("/")[1:3]), "" if epoch is None else f"epoch {epoch:.1f}"]
        parts += [f"score {score:.1f}" if score else ""]
    show("runs", event.done, event.total, "  ".join(filter(None, parts)), line)


def _print_overview(overview: dict[str, Any]) -> None:
    tasks = list(dict.fromkeys(one["task"] for one in overview["arms"]))
    arms = list(dict.fromkeys(one["arm"] for one in overview["arms"]))
    left = {(one["task"], one["arm"]): f"{one['runs'] - one['finished']} of {one['runs']}" for one in overview["arms"]}
    rows = [(task, *(left.get((task, arm), "–") for arm in arms)) for task in tasks]
    print_table(("task", *arms), rows, title="runs still to do, of those planned")
    console = SafeConsole()
    counts = f"{overview['runs']:,} runs, {overview['finished']:,} of them finished"
    console.tell(f"{counts}; teachers that label the rows, once each: {overview['labellings']:,}")
    if (seconds := overview["seconds"]) is None:
        console.tell(f"no time estimate: {overview['obstacle']}")
        return
    time = f"{seconds / 3600:,.1f} hours" if seconds > 5400 else f"{max(2, round(seconds / 60))} minutes"
    console.tell(f"about {time}, one run at a time, estimated from a few forward passes on this machine")


def _print_suite(result: SuiteResult) -> None:
    console = SafeConsole()
    finished = sum(record.status == "finished" for record in result.records.values())
    console.print(f"{finished:,} runs finished, {result.reused:,} of them before; {len(result.failed):,} failed")
    for record in result.failed[:20]:
        console.tell(f"failed: {record.experiment}, {record.arm}, seed {record.seed}: {record.error}", style="red")
    if len(result.failed) > 20:
        console.tell(f"and {len(result.failed) - 20:,} more, all in {result.tables[-1]}")
    for path in result.tables:
        console.tell(str(path))


def _show_search(event: SearchEvent, show: Show) -> None:
    """Draw one bar for the search; a log has a line for each trial that ends."""
    count, now = f"{event.done}/{event.trials}  ", f"trial {event.number}"
    best = "" if event.best is None else f"best {event.best:.2f}  "
    epoch = getattr(event.detail, "epoch", None)
    status = count + best + now + (f", epoch {epoch:.1f}" if epoch is not None else "")
    line = f"{count}{now}  {event.detail}" if isinstance(event.detail, str) else ""
    show("trials", event.done, event.trials, status, line)


@dataclass(frozen=True)
class Label:
    """What `kdlora label` is told; the fields after `to` but `on` are those of `LabelSettings`."""

    model: Annotated[str, Argument(help="Fine-tuned teacher: a folder, such as runs/NAME/teacher, or a Hub id.")]
    data: Annotated[str, Argument(help="File, folder or quoted pattern: Parquet, JSON Lines, CSV, TSV, text.")]
    to: Annotated[Path, Option("--to", help="Output folder. The same command continues.")]
    on: On = None
    text: Text = None
    id_column: IdColumn = "id"
    label_names: Annotated[
        list[str] | None,
        Option("--label-name", metavar="NAME", help="Name of a model output. Give it once per output, in order."),
    ] = None
    revision: Annotated[str | None, Option(help="Commit, tag or branch of a Hub id.")] = None
    max_length: Annotated[
        int | None, Option(help="Longest input in tokens. Default: as the model was trained, else 128.")
    ] = None
    rows_per_shard: Annotated[
        int | None,
        Option(help="Rows per output file. A kill costs no more. Default: 10,000, or as it was begun."),
    ] = None
    precision: Annotated[str, Option(help="auto, fp32, bf16 or fp16.")] = "auto"
    device: Annotated[str, Option(help="auto, cpu or cuda.")] = "auto"
    texts: Annotated[bool, Option("--with-texts/--without-texts", help="Keep the texts, for data.unlabelled.")] = True
    strict: Annotated[bool, Option("--strict", help="Stop at the first bad row.")] = False
    as_json: Json = False


@verb(Label)
def label(options: Label) -> None:
    """Store a teacher's logits for any number of texts, in constant memory. After a kill, the same command continues.

    Use the folder as data.unlabelled or as teacher.logits.

    Example: kdlora label runs/reviews/teacher 'texts/*.parquet' --to labelled --text body
    """
    from kdlora.system.launch import check_alone

    check_alone("label")
    from kdlora.experiment.labelling import LabelSettings, label_collection

    given = {name: value for name, value in vars(options).items() if name in LabelSettings.__dataclass_fields__}
    settings = LabelSettings(**given)
    with draw_bars() as show:
        summary = label_collection(
            options.model, options.data, options.to, settings, on=options.on, progress=counting(show)
        )
    if options.as_json:
        print_json(summary)
        return
    bad = f", {summary.rejected} rejected (rejected-*.jsonl)" if summary.rejected else ""
    cut = f", {summary.truncated} cut at {summary.max_length} tokens" if summary.truncated else ""
    print(f"{summary.rows:,} rows{bad}{cut} in {summary.folder}; files: {summary.shards:,}", file=sys.stderr)


@app.command()
def serve(
    models: Annotated[list[str], Argument(help="Model folders, experiments or Hub ids. NAME=FOLDER names one.")],
    host: Annotated[str, Option(help="Address to listen at. 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port. 0: any free one.", min=0, max=65535)] = 8000,
    threads: Threads = None,
    runtime: Annotated[
        Runtime, Option(help="auto: the fastest when kdlora benchmark measured it here.")
    ] = "onnxruntime",
    waiting: Annotated[int, Option(help="Texts that may wait for a model. Beyond, the answer is 503.")] = 1024,
    texts: Annotated[int, Option(help="Largest number of texts in one request.")] = 256,
    characters: Annotated[int, Option(help="Largest number of characters in one text.")] = 20_000,
    body_bytes: Annotated[int, Option(help="Largest request, in bytes.")] = 1_000_000,
    as_json: Json = False,
) -> None:
    """Serve models over HTTP: /predict, /health and /metrics. SIGTERM ends it when what has begun is answered.

    Example: kdlora serve runs/reviews --port 8000

    Example: kdlora serve film=runs/reviews topic=runs/topics --host 0.0.0.0
    """
    from kdlora.deploy.serving import Limits, describe
    from kdlora.deploy.serving import serve as serve_models

    def ready(address: str, models: Mapping[str, Model]) -> None:
        if as_json:
            print_json({"address": address, "models": {name: describe(one) for name, one in models.items()}})
        else:
            print("\n".join(f"{name}: {model!r}" for name, model in models.items()))
            print(f"listening at {address}")
        sys.stdout.flush()

    limits = Limits(waiting=waiting, texts=texts, characters=characters, body_bytes=body_bytes)
    serve_models(models, host=host, port=port, threads=threads, runtime=runtime, limits=limits, ready=ready)
