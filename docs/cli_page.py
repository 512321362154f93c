"""The page of the command line, from the commands themselves."""

from __future__ import annotations

import re
from typing import Any

import typer

from kdlora.cli import app


def cli_page() -> str:
    """Describe every verb: what it does, its arguments, options and examples."""
    parts = [
        "# Command line",
        "",
        "This page is generated from the commands by `make docs`.",
        "",
        "Results go to standard output, everything else (bars, notes, errors) to standard error. `--json` makes any "
        "command print JSON. Bars are drawn in a terminal only. `NO_COLOR=1` switches colours off. `KDLORA_LOG=INFO` "
        "prints more. `kdlora --install-completion` installs completion for bash, zsh, fish and PowerShell.",
        "",
        "| exit code | meaning |",
        "|---|---|",
        "| 0 | done |",
        "| 1 | a run failed, or the machine did: disk full, out of memory, network gone |",
        "| 2 | a mistake in the command, the config or the data; the message says what to change |",
        "| 130 | interrupted with Ctrl-C; the same command continues, or begins again, as it says |",
        "| 143, 129 | ended by SIGTERM, or by a closed terminal (SIGHUP); likewise |",
    ]
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        parts += _verb(name, command)
    return "\n".join(parts) + "\n"


def _verb(name: str, command: Any) -> list[str]:
    text, examples = _split_examples(command.help or "")
    lines = ["", f"## kdlora {name}", "", text, "", "```", *examples, "```"]
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    if arguments:
        lines += ["", "| argument | meaning |", "|---|---|"]
        for one in arguments:
            several = " (one or more)" if one.nargs == -1 else ""
            optional = "" if one.required else " (optional)"
            lines.append(f"| `{str(one.name).upper()}`{several}{optional} | {_cell(one.help)} |")
    if options:
        lines += ["", "| option | default | meaning |", "|---|---|---|"]
        lines += [f"| {_names(one)} | {_default(one)} | {_cell(one.help)} |" for one in options]
    return lines


def _split_examples(text: str) -> tuple[str, list[str]]:
    examples = [" ".join(found.split()) for found in re.findall(r"Example: (.*?)(?:\n\n|\Z)", text, re.DOTALL)]
    plain = re.sub(r"Example: .*?(?:\n\n|\Z)", "", text, flags=re.DOTALL)
    return "\n\n".join(" ".join(part.split()) for part in plain.split("\n\n") if part.strip()), examples


def _names(option: Any) -> str:
    names = [*option.opts, *option.secondary_opts]
    takes = "" if option.is_flag else f" {option.metavar or option.name.removesuffix('_column').upper()}"
    several = ", more than once" if option.multiple else ""
    return f"`{' / '.join(names)}{takes}`{several}"


def _default(option: Any) -> str:
    if option.default is None or option.default in ((), []) or (option.is_flag and option.default is False):
        return "–"
    return f"`{option.default}`"


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|").replace("<", "&lt;")
