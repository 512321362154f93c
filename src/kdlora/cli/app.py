"""The Typer application, and the options that several verbs share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kdlora.errors import harmless_json

app = typer.Typer(
    name="kdlora",
    help="Distil a fine-tuned encoder into a small, fast classifier, with the evidence that it is as good.",
    epilog="Exit codes: 0 done; 1 a run failed, or the machine did (disk, memory); 2 a mistake in the command, the "
    "config or the data; 130 interrupted, 143 and 129 ended by a signal: the same command continues. Results go to "
    "standard output, everything else to standard error. NO_COLOR=1 switches colours off, KDLORA_LOG=INFO tells more. "
    "Tab completes verbs and names after: kdlora --install-completion",
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


def print_json(value: Any) -> None:
    """Print a value as JSON for programs."""
    print(harmless_json(json.dumps(value, indent=2, ensure_ascii=False, default=str)))


def complete_tasks(incomplete: str) -> list[str]:
    """Complete the name of a GLUE task."""
    from kdlora.data.tasks import GLUE

    return [name for name in GLUE if name.startswith(incomplete)]


def complete_families(incomplete: str) -> list[str]:
    """Complete the name of a pair of models."""
    from kdlora.defaults import FAMILIES

    return [name for name in FAMILIES if name.startswith(incomplete)]


def complete_formats(incomplete: str) -> list[str]:
    """Complete the name of an export format."""
    return [name for name in ("onnx", "onnx-int8", "all") if name.startswith(incomplete)]


def complete_overrides(incomplete: str) -> list[str]:
    """Complete the key of `--set`, section by section."""
    from kdlora.configfile import known_keys

    return [f"{key}=" for key in known_keys() if key.startswith(incomplete)]


Out = Annotated[Path | None, typer.Option("--out", help="Experiment folder; default runs/<name>.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a config key; values are YAML.",
        autocompletion=complete_overrides,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
