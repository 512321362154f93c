"""The verbs that tell what kdlora knows, and what it found on this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from kdlora.cli.app import Json, app, print_json
from kdlora.console import SafeConsole

if TYPE_CHECKING:
    from kdlora.doctor import Diagnosis


@app.command()
def tasks(as_json: Json = False) -> None:
    """List the GLUE tasks with their columns, labels and metrics.

    Example: kdlora tasks
    """
    from kdlora.data.tasks import GLUE

    if as_json:
        print_json({name: task.task.to_dict() for name, task in GLUE.items()})
        return
    table = Table("task", "kind", "text", "labels", "score")
    for name, task in GLUE.items():
        table.add_row(name, task.kind, ", ".join(task.text), ", ".join(task.label_names), " + ".join(task.metrics))
    SafeConsole().print(table)


@app.command()
def families(as_json: Json = False) -> None:
    """List the paper's pairs of teacher and student.

    Example: kdlora families
    """
    from kdlora.defaults import FAMILIES

    if as_json:
        print_json({name: {"teacher": teacher, "student": student} for name, (teacher, student) in FAMILIES.items()})
        return
    table = Table("family", "teacher", "student")
    for name, (teacher, student) in FAMILIES.items():
        table.add_row(name, teacher, student)
    SafeConsole().print(table)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what a bug report needs: versions, device, threads, memory, the Hub, missing extras.

    Exits with 1 where a requirement of kdlora itself is not met. Nothing that it prints names you or your folders.

    Example: kdlora doctor

    Example: kdlora doctor --json > doctor.json
    """
    from kdlora.doctor import diagnose

    found = diagnose()
    if as_json:
        print_json(asdict(found))
    else:
        _print_diagnosis(found)
    raise typer.Exit(1 if found.problems else 0)


def _print_diagnosis(found: Diagnosis) -> None:
    threads = "" if found.threads is None else f", {found.threads} CPU threads"
    memory = "unknown" if found.free_memory is None else f"{found.free_memory} GiB"
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "machine": ", ".join(f"{name} {value}" for name, value in found.machine.items()),
        "device": found.device + threads,
        "free": f"memory {memory}, disk of the Hub's cache {found.free_disk} GiB",
        "hub": found.hub,
    }
    for extra, unmet in found.extras.items():
        lines[f"extra {extra}"] = f"lacks {'; '.join(unmet)}: pip install 'kdlora[{extra}]'" if unmet else "complete"
    lines["problems"] = "; ".join(found.problems) or "none"
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
