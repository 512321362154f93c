"""The verbs that decide by the shipped model's probabilities: when it gives no label, and which one."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from kdlora.cli.app import Json, app, print_json, print_table
from kdlora.errors import ConfigError, harmless


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
    from kdlora.evidence.defer import EVERYTHING
    from kdlora.experiment.deferral import defer_experiment
    from kdlora.report.deferred import UNKNOWN_COLUMNS, unknown_rows
    from kdlora.report.report import make_report

    found = defer_experiment(
        experiment, data=data, unknown=unknown, error=error, confidence=confidence, sureness=sureness
    )
    make_report([experiment])
    if as_json:
        print_json(asdict(found))
        return
    rows = [
        (model.name, "–", "–", "–", f"{model.area:.2%}")
        if (promise := model.promise) is None
        else (
            model.name,
            f"{promise.coverage:.1%}",
            f"{promise.wrong} of {promise.answered}",
            "none" if promise.threshold == EVERYTHING else f"{promise.threshold:.4f}",
            f"{model.area:.2%}",
        )
        for model in found.models
    ]
    header = ("model", "answers", "wrong among them", f"least {found.sureness}", "error, mean over coverages")
    print_table(
        header, rows, caption=f"{found.rows} rows of {found.source}, at most {error:.1%} wrong, {confidence:.0%}"
    )
    if strange := unknown_rows(found):
        rows_of_unknown = [[say(one) for say in UNKNOWN_COLUMNS.values()] for one in strange]
        print_table(list(UNKNOWN_COLUMNS), rows_of_unknown, caption=f"{found.unknown:,} texts of no known class")
    for model in found.models:
        if model.reason:
            print(harmless(f"{model.name}: {model.reason}"), file=sys.stderr)
    if found.known:
        print(f"{found.known} rows were left out, since their texts are training or validation texts", file=sys.stderr)


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
    from kdlora.experiment.fitting import fit_thresholds
    from kdlora.report.deferred import THRESHOLD_COLUMNS, describe_thresholds, threshold_rows
    from kdlora.report.report import make_report

    if metric is not None and precision is not None:
        raise ConfigError("--metric and --precision are two goals; give one of them")
    goal = precision if precision is not None else metric
    found = fit_thresholds(experiment, goal if label is None else dict.fromkeys(label, goal))
    make_report([experiment])
    if as_json:
        print_json(asdict(found))
        return
    rows = [[harmless(say(one)) for say in THRESHOLD_COLUMNS.values()] for one in threshold_rows(found)]
    print_table(list(THRESHOLD_COLUMNS), rows, caption=describe_thresholds(found))
    for note in found.notes:
        print(harmless(note), file=sys.stderr)
