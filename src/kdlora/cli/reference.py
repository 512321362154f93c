"""The verbs that tell what kdlora knows, and what it found on this machine."""

from __future__ import annotations

from dataclasses import asdict

import typer

from kdlora.cli.app import Json, app, print_json, print_table


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
    from kdlora.defaults import FAMILIES

    if as_json:
        print_json({name: {"teacher": teacher, "student": student} for name, (teacher, student) in FAMILIES.items()})
        return
    print_table(("family", "teacher", "student"), [(name, *models) for name, models in FAMILIES.items()])


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
        lines = found.lines()
        width = max(map(len, lines))
        print("\n".join(f"{name:<{width}}  {text}" for name, text in lines.items()))
    raise typer.Exit(1 if found.problems else 0)
