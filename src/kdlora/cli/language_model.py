"""The verb that asks a language model."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from kdlora.cli.app import IdColumn, Json, Text, app, completing, print_json, print_table, verb
from kdlora.errors import harmless
from kdlora.terminal import draw_bars

if TYPE_CHECKING:
    from kdlora.asking.ask import AskPlan, AskSummary
    from kdlora.asking.asksettings import AskSettings
    from kdlora.asking.audit import Audit

__all__ = ["app"]


@dataclass(frozen=True)
class Ask:
    """What `kdlora ask` is told."""

    data: Annotated[str, Argument(help="CSV, TSV, JSON Lines, Parquet or text file, with or without labels.")]
    to: Annotated[Path, Option("--to", help="Folder of the answers and the table; the same command goes on.")]
    model: Annotated[str, Option(help="Name of the model on the server.")]
    base_url: Annotated[
        str | None, Option(metavar="URL", help="Server, up to /v1; default OPENAI_BASE_URL, else OpenAI's.")
    ] = None
    key_variable: Annotated[str, Option(metavar="NAME", help="Environment variable with the key.")] = "OPENAI_API_KEY"
    protocol: Annotated[
        str, Option(help="chat or completions.", autocompletion=completing(lambda: ("chat", "completions")))
    ] = "chat"
    prompt: Annotated[
        list[str] | None,
        Option(metavar="FILE", help="Jinja template; more than once to compare on the audit rows."),
    ] = None
    labels: Annotated[
        str | None, Option(metavar="FILE", help="YAML: a list of labels, or a mapping to descriptions.")
    ] = None
    text: Text = None
    label: Annotated[str | None, Option(metavar="COLUMN", help="Label column, where people labelled rows.")] = None
    id_column: IdColumn = "id"
    shots: Annotated[int, Option(help="Labelled rows that each prompt shows as examples.")] = 0
    seed: Annotated[int, Option(help="Of all draws.")] = 0
    votes: Annotated[int, Option(help="Answers to count, where a server gives no log-probabilities.")] = 0
    temperature: Annotated[float | None, Option(help="Of the answers; default 0, with votes 1.")] = None
    top_logprobs: Annotated[int, Option(help="Likely tokens that the server shows, at most 20.")] = 20
    audit: Annotated[
        str | None, Option(metavar="FILE|N", help="Rows with people's labels, or how many of DATA's to draw.")
    ] = None
    unlabelled: Annotated[str | None, Option(metavar="FILE", help="More texts, without labels.")] = None
    rows: Annotated[int | None, Option(help="Ask about so many rows of DATA only.")] = None
    select: Annotated[
        str,
        Option(
            help="Which: random, uncertain or diverse.",
            autocompletion=completing(lambda: ("random", "uncertain", "diverse")),
        ),
    ] = "random"
    select_by: Annotated[str | None, Option(metavar="MODEL", help="Model folder whose doubts choose (uncertain).")] = (
        None
    )
    concurrency: Annotated[int, Option(help="Requests under way at a time.")] = 16
    max_requests: Annotated[int | None, Option(help="Requests in all; never passed.")] = None
    max_tokens: Annotated[int | None, Option(help="Tokens read and written in all; never passed.")] = None
    max_cost: Annotated[float | None, Option(help="Money in all, by the prices; never passed.")] = None
    price_in: Annotated[float | None, Option(help="Price of a million tokens read.")] = None
    price_out: Annotated[float | None, Option(help="Price of a million tokens written.")] = None
    timeout: Annotated[float, Option(help="Seconds for one answer.")] = 60.0
    dry_run: Annotated[bool, Option("--dry-run", help="Show three prompts, count, and ask nothing.")] = False
    as_json: Json = False


@verb(Ask)
def ask(options: Ask) -> None:
    """Ask a language model for the label of every row: a table of probabilities that teaches (teacher.probabilities).

    Answers are kept as they come, so a killed call is continued; refusals and nonsense are counted, never labels.

    Example: kdlora ask train.csv --to asked --model qwen2.5 --base-url http://127.0.0.1:8000/v1 --audit validation.csv

    Example: kdlora ask train.csv --to asked --model gpt-4o-mini --max-cost 5 --price-in 0.15 --price-out 0.6 --dry-run
    """
    from kdlora.asking.ask import ask as ask_model
    from kdlora.asking.ask import plan_asking

    settings = _settings(options)
    if options.dry_run:
        plan = plan_asking(options.data, settings)
        print_json(asdict(plan)) if options.as_json else _print_plan(plan)
        return
    with draw_bars() as show:

        def advance(done: int, total: int) -> None:
            if show is not None:
                show("rows", done, total, f"{done:,} of {total:,}")

        summary = ask_model(options.data, options.to, settings, progress=advance)
    print_json(asdict(summary)) if options.as_json else _print_summary(summary)


def _settings(options: Ask) -> AskSettings:
    from kdlora.asking.asked_rows import read_labels
    from kdlora.asking.asksettings import AskSettings

    given = asdict(options)
    for name in ("data", "to", "dry_run", "as_json"):
        del given[name]
    given["prompts"] = tuple(given.pop("prompt") or ())
    given["text"] = None if options.text is None else tuple(options.text)
    given["labels"] = None if options.labels is None else read_labels(options.labels)
    given["audit"] = int(given["audit"]) if (options.audit or "").isdecimal() else options.audit
    return AskSettings(**given)


def _print_plan(plan: AskPlan) -> None:
    for prompt in plan.prompts:
        print(harmless(prompt), end="\n\n---\n\n")
    cost = "" if plan.cost is None else f", {plan.cost:.2f} to pay"
    print(f"{plan.rows:,} rows, {plan.requests:,} requests, about {plan.tokens:,} tokens to read{cost}")


def _print_summary(summary: AskSummary) -> None:
    if summary.audit is not None:
        _print_audit(summary.audit)
    cost = "" if summary.cost is None else f", {summary.cost:.4f} paid"
    tokens = f"{summary.tokens_read + summary.tokens_written:,} tokens"
    said = [f"{summary.rows:,} rows in {summary.table}; {summary.requests:,} requests, {tokens}{cost} in all"]
    if summary.unanswered:
        said.append(f"{summary.unanswered:,} without an answer, left out of the table:")
        said += [f"  {one['split']} {one['id']}: {one['unanswered']}" for one in summary.examples]
    if summary.left:
        said.append(f"{summary.left:,} rows were not asked: the budget is used up; the same command with more goes on")
    print(harmless("\n".join(said)), file=sys.stderr)


def _print_audit(audit: Audit) -> None:
    rows = []
    for place, one in enumerate(audit.prompts):
        interval = f"{one.accuracy:.1f} ({one.low:.1f} to {one.high:.1f})"
        found = one.against_chosen
        against = "–" if found is None else f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"
        f1 = "–" if one.macro_f1 is None else f"{one.macro_f1:.1f}"
        mark = "* " if place == audit.chosen else ""
        rows.append((mark + one.prompt, f"{one.chosen_on:.1f}", interval, f1, against, str(one.unanswered)))
    header = (
        "prompt (* chosen)",
        "accuracy, choosing half",
        "reported half",
        "macro F1",
        "against chosen",
        "unanswered",
    )
    print_table(header, rows, title=f"Audit on {audit.rows} rows with people's labels")
    confusion = [(name, *map(str, row)) for name, row in zip(audit.label_names, audit.confusion, strict=True)]
    if len(audit.label_names) <= 10:
        print_table(("people's label", *audit.label_names, "unanswered"), confusion)
    if audit.ece_before is not None:
        print(
            f"temperature {audit.temperature:.2f}; calibration error {audit.ece_before:.3f} without it, "
            f"{audit.ece_after:.3f} with it"
        )
