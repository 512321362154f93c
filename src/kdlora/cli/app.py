"""The Typer application, what verbs share (options, tables, JSON), and the verbs that tell what kdlora knows."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.measure import Measurement
from rich.table import Table

from kdlora.defaults import FAMILIES
from kdlora.errors import harmless_json
from kdlora.terminal import SafeConsole, Show

if TYPE_CHECKING:
    from kdlora.report.page import Table as Figures

app = typer.Typer(
    name="kdlora",
    help="Distil a fine-tuned encoder into a small, fast classifier, and measure what the teacher was worth.",
    epilog="Exit codes: 0 done; 1 a run failed, or the machine did (disk, memory); 2 a mistake in the command, the "
    "config or the data; 130, 143 and 129 interrupted: run the same command again to continue. Results go to "
    "standard output, everything else to standard error. NO_COLOR=1 switches colours off. KDLORA_LOG=INFO prints more. "
    "kdlora --install-completion installs completion with Tab.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"kdlora {version('kdlora')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Hold the options that stand before a verb; the application's own help is shown in place of this."""


def verb(options: type[Any]) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Make a verb of a function that takes a dataclass, whose fields are the verb's arguments and options."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def command(**values: Any) -> None:
            function(options(**values))

        hints = get_type_hints(options, include_extras=True)
        signature = inspect.signature(options)
        parameters = [one.replace(annotation=hints[one.name]) for one in signature.parameters.values()]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = hints
        app.command(function.__name__, help=inspect.getdoc(function))(command)
        return function

    return register


def print_json(value: Any) -> None:
    from pydantic_core import to_jsonable_python

    plain = functools.partial(to_jsonable_python, fallback=str)
    print(harmless_json(json.dumps(value, indent=2, ensure_ascii=False, default=plain)))


def print_found(found: object, tables: Iterable[Figures], as_json: bool) -> None:
    """Print what a verb found: as JSON, or as the tables that a report would have."""
    if as_json:
        print_json(found)
        return
    for table in tables:
        print_table(table.columns, table.texts(), caption=table.note)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], **settings: Any) -> None:
    """Print a table for people: turned on its side where a terminal is too narrow, as wide as it is in a file."""
    lines, console = [header, *rows], SafeConsole()

    def build() -> Table:
        table = Table(*lines[0], **settings)
        for line in lines[1:]:
            table.add_row(*line)
        return table

    wide = Measurement.get(console, console.options.update(width=1000), build()).maximum
    if not console.is_terminal:
        console.width = max(console.width, wide)
    elif wide > console.width and len(lines) < len(header):
        lines = [list(column) for column in zip(*lines, strict=True)]
    console.print(build())


def counting(show: Show) -> Callable[[int, int | None], None]:
    """Give what draws the bar of the rows that are done, of how many where that is known."""
    return lambda done, total: show("rows", done, total, f"{done:,}" if total is None else f"{done:,} of {total:,}")


def completing(list_names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    return lambda incomplete: [name for name in list_names() if name.startswith(incomplete)]


def _assignments() -> Iterable[str]:
    from kdlora.configfile import known_keys

    return [f"{key}=" for key in known_keys()]


_SET = {"metavar": "KEY=VALUE", "autocompletion": completing(_assignments)}
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Out = Annotated[Path | None, typer.Option("--out", help="Experiment folder. Default: runs/<name>.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Set a config key. Values are YAML.", **_SET)]
Text = Annotated[list[str] | None, typer.Option(metavar="COLUMN", help="Text column. Give it twice for a pair.")]
Threads = Annotated[
    int | None,
    typer.Option(
        help="CPU threads of each model. Default: one per core, or as many as a container's CPU limit allows."
    ),
]
IdColumn = Annotated[str, typer.Option(metavar="COLUMN", help="Column with the ids of the rows.")]


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the GLUE tasks with their columns, labels and metrics.

    Example: kdlora tasks
    """
    from kdlora.data.tasks import GLUE

    if as_json:
        print_json({name: task.task.to_dict() for name, task in GLUE.items()})
        return
    rows = [
        (name, task.kind, ", ".join(task.text), ", ".join(task.label_names), " + ".join(task.metrics))
        for name, task in GLUE.items()
    ]
    print_table(("task", "kind", "text", "labels", "score"), rows)


@app.command()
def families(as_json: Json = False) -> None:
    """List the paper's pairs of teacher and student.

    Example: kdlora families
    """
    if as_json:
        print_json({name: {"teacher": teacher, "student": student} for name, (teacher, student) in FAMILIES.items()})
    else:
        print_table(("family", "teacher", "student"), [(name, *models) for name, models in FAMILIES.items()])


@app.command()
def doctor(as_json: Json = False) -> None:
    """Print what a bug report needs: versions, device, threads, memory, access to the Hub, missing extras.

    The exit code is 1 if a requirement of kdlora is not met. The output names neither you nor your folders.

    Example: kdlora doctor

    Example: kdlora doctor --json > doctor.json
    """
    from kdlora.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(found)
    else:
        lines = found.lines()
        width = max(map(len, lines))
        print("\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()))
    raise typer.Exit(1 if found.problems else 0)
