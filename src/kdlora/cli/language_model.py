"""The verb that asks a language model; its options are the settings, with their texts."""

from __future__ import annotations

import re
import sys
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from typer import Argument, Option

from kdlora.asking.asksettings import AskSettings
from kdlora.cli.app import IdColumn, Json, Text, counting, print_json, print_table, verb
from kdlora.errors import harmless
from kdlora.terminal import draw_bars

if TYPE_CHECKING:
    from kdlora.asking.ask import AskSummary
    from kdlora.asking.audit import Audit

_TEXTS = dict(re.findall(r"^ {8}(\w+): (.+)$", AskSettings.__doc__ or "", re.MULTILINE))
_SHARED = {"text": Text, "id_column": IdColumn}
_OTHERWISE = {
    "prompts": (list[str], "--prompt", "FILE"),
    "labels": (str | None, "--labels", "YAML"),
    "audit": (str | None, "--audit", "FILE|N"),
    "unlabelled": (str | None, "--unlabelled", "FILE"),
}


def _option(name: str, kind: Any) -> Any:
    if name in _SHARED:
        return _SHARED[name]
    text = _TEXTS.get(name, name)  # Python without docstrings (-OO) has none
    text = text[0].upper() + text[1:]
    if name in _OTHERWISE:
        own, flag, metavar = _OTHERWISE[name]
        return Annotated[own, Option(flag, metavar=metavar, help=text)]
    return Annotated[kind, Option(help=text)]


_KINDS = get_type_hints(AskSettings)
_GIVEN = [(one.name, _option(one.name, _KINDS[one.name]), one.default) for one in fields(AskSettings)[1:]]
Ask = make_dataclass(
    "Ask",
    [
        ("data", Annotated[str, Argument(help="CSV, TSV, JSON Lines, Parquet or text file, with or without labels.")]),
        ("to", Annotated[Path, Option("--to", help="Output folder. The same command continues.")]),
        ("model", Annotated[str, Option(help="Name of the model on the server.")]),
        *_GIVEN,
        ("dry_run", Annotated[bool, Option("--dry-run", help="Print three prompts and the cost; ask nothing.")], False),
        ("as_json", Json, False),
    ],
)


@verb(Ask)
def ask(options: Any) -> None:
    """Ask a language model for the label of every row, and write a table for teacher.probabilities.

    Each answer is stored, so the same command continues. Refusals and unusable answers are counted and left out.

    Example: kdlora ask train.csv --to asked --model qwen2.5 --base-url http://127.0.0.1:8000/v1 --audit validation.csv

    Example: kdlora ask train.csv --to asked --model gpt-4o-mini --max-cost 5 --price-in 0.15 --price-out 0.6 --dry-run
    """
    from kdlora.asking.ask import ask as ask_model
    from kdlora.asking.ask import plan_asking

    settings = _settings(options)
    if options.dry_run:
        plan = plan_asking(options.data, settings)
        if options.as_json:
            print_json(plan)
            return
        cost = "" if plan.cost is None else f", cost {plan.cost:.2f}"
        print(harmless("".join(f"{prompt}\n\n---\n\n" for prompt in plan.prompts)), end="")
        print(f"{plan.rows:,} rows, {plan.requests:,} requests, about {plan.tokens:,} tokens to read{cost}")
        return
    with draw_bars() as show:
        summary = ask_model(options.data, options.to, settings, progress=counting(show))
    print_json(summary) if options.as_json else _print_summary(summary)


def _settings(options: Any) -> AskSettings:
    from kdlora.asking.asked_rows import read_labels

    given = {one.name: getattr(options, one.name) for one in fields(AskSettings)}
    if options.labels is not None:
        given["labels"] = read_labels(options.labels)
    if (options.audit or "").isdecimal():
        given["audit"] = int(options.audit)
    return AskSettings(**given)


def _print_summary(summary: AskSummary) -> None:
    if summary.audit is not None:
        _print_audit(summary.audit)
    cost = "" if summary.cost is None else f", {summary.cost:.4f} paid"
    tokens = f"{summary.tokens_read + summary.tokens_written:,} tokens"
    table = f"{summary.rows:,} rows in {summary.table}" if summary.rows else "No table before the audit is done"
    said = [f"{table}; {summary.requests:,} requests, {tokens}{cost} in all"]
    if (asked := summary.asked).per_second is not None:
        price = "" if asked.cost_per_million is None else f" and {asked.cost_per_million:,.2f}"
        speed = f"{asked.per_second:.3g} a second, {asked.concurrency} at a time"
        said.append(f"{speed}; a million take {1e6 / asked.per_second / 3600:,.1f} h{price}")
    if summary.unanswered:
        left = "where the chosen prompt has none, the table has no row"
        said.append(f"{summary.unanswered:,} without an answer; {left}:")
        said += [f"  {one['split']} {one['id']}: {one['unanswered']}" for one in summary.examples]
    if summary.left:
        said.append(f"{summary.left:,} rows are left: the budget is used up; raise it, and run the command again")
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
    counts = [sum(row) for row in audit.confusion]
    always, share = audit.label_names[counts.index(max(counts))], max(counts) / sum(counts)
    title = f"Audit on {audit.rows} rows with people's labels (reported half: {share:.1%} are {always!r})"
    print_table(header, rows, title=title)
    confusion = [(name, *map(str, row)) for name, row in zip(audit.label_names, audit.confusion, strict=True)]
    if len(audit.label_names) <= 10:
        print_table(("people's label", *audit.label_names, "unanswered"), confusion)
    if audit.untempered:
        print(f"temperature 1, not fitted: {audit.untempered}")
    elif audit.ece_before is not None:
        error = f"{audit.ece_before:.3f} before, {audit.ece_after:.3f} after"
        print(f"temperature {audit.temperature:.2f}; calibration error {error}")
    if audit.bias:
        bias = ", ".join(f"{name} {value:+.2f}" for name, value in zip(audit.label_names, audit.bias, strict=True))
        without = f"{audit.prompts[audit.chosen].accuracy:.1f} without it"
        print(harmless(f"bias of the labels: {bias}; accuracy {without}, {audit.accuracy_after:.1f} with it"))
