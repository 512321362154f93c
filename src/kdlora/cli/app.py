"""The Typer application, and the options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="kdlora",
    help="Distil a fine-tuned encoder into a small, fast classifier, with the evidence that it is as good.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path | None, typer.Option("--out", help="Experiment folder; default runs/<name>.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a config key; values are YAML.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
