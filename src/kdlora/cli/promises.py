"""The verbs that decide by the shipped model's probabilities: when it gives no label, and which one."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from kdlora.cli.app import Json, app, print_json, print_table
from kdlora.errors import ConfigError


@app.command()
def defer(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    error: Annotated[float, Option(help="Largest share of wrong answers.")] = 0.02,
    confidence: Annotated[float, Option(help="Confidence of that promise.")] = 0.95,
    sureness: Annotated[
        Literal["probability", "margin", "energy"], Option(help="Number that is compared with the threshold.")
    ] = "probability",
    data: Annotated[str | None, Option(help="Labelled rows not used before. Default: the test split.")] = None,
    unknown: Annotated[str | None, Option(help="Texts of no known class: how many would be deferred?")] = None,
    as_json: Json = False,
) -> None:
    """Promise an error rate for the shipped model. From then on it gives no label where it is not sure enough.

    Example: kdlora defer runs/reviews --error 0.02 --confidence 0.95
    """
    from kdlora.experiment.deferral import defer_experiment
    from kdlora.report.deferred import deferral_tables
    from kdlora.report.report import make_report

    found = defer_experiment(
        experiment, data=data, unknown=unknown, error=error, confidence=confidence, sureness=sureness
    )
    make_report(experiment)
    if as_json:
        print_json(asdict(found))
        return
    for table in deferral_tables(found):
        print_table(table.columns, table.texts(), caption=table.note)


@app.command()
def thresholds(
    experiment: Annotated[Path, Argument(help="Experiment folder.")],
    metric: Annotated[
        str | None, Option(help="f1, macro_f1, accuracy, balanced_accuracy, matthews. Default: the task's, else f1.")
    ] = None,
    precision: Annotated[float | None, Option(help="Instead: this precision, with the highest recall.")] = None,
    label: Annotated[
        list[str] | None,
        Option("--label", "--positive", metavar="NAME", help="Only this label. With two labels: the positive one."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Fit the probability above which a label is predicted, for each shipped file, on validation rows.

    A multi-label task has one per label; a task with two labels has one, of the second or the one --positive names.

    Example: kdlora thresholds runs/topics --precision 0.9 --label sport
    """
    from kdlora.experiment.deferral import fit_thresholds
    from kdlora.report.deferred import threshold_table
    from kdlora.report.report import make_report

    if metric is not None and precision is not None:
        raise ConfigError("--metric and --precision are two goals; give one of them")
    goal = precision if precision is not None else metric
    found = fit_thresholds(experiment, goal if label is None else dict.fromkeys(label, goal))
    make_report(experiment)
    if as_json:
        print_json(asdict(found))
        return
    table = threshold_table(found)
    print_table(table.columns, table.texts(), caption=table.note)
