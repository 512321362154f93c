"""The verbs that list what kdlora knows."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kdlora.cli.app import app


@app.command()
def tasks() -> None:
    """List the GLUE tasks with their columns, labels and metrics.

    Example: kdlora tasks
    """
    from kdlora.data.tasks import GLUE

    table = Table("task", "kind", "text", "labels", "score")
    for name, task in GLUE.items():
        table.add_row(name, task.kind, ", ".join(task.text), ", ".join(task.label_names), " + ".join(task.metrics))
    Console().print(table)


@app.command()
def families() -> None:
    """List the paper's pairs of teacher and student.

    Example: kdlora families
    """
    from kdlora.config import FAMILIES

    table = Table("family", "teacher", "student")
    for name, (teacher, student) in FAMILIES.items():
        table.add_row(name, teacher, student)
    Console().print(table)
