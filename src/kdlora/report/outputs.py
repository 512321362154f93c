"""What a model says: confusions, residuals, calibration, and where teacher and student differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import rel_entr

from kdlora.data.tags import Integers, Span, decode, entity_bounds, spans_of
from kdlora.data.tasks import Task
from kdlora.evidence.metrics import Reliability, predict_labels, probabilities, reliability
from kdlora.evidence.predictions import ExampleText, Predictions
from kdlora.evidence.ranking import counts_from_logits, entity_rates
from kdlora.evidence.stats import mean_sd
from kdlora.report.collect import Experiment
from kdlora.report.findings import CONTROLS, align
from kdlora.report.page import Block, Figure, Paragraph, Pieces, Quotation, Row, Table
from kdlora.report.plots import PALETTE, arm_style, draw, named, padded, scatter, shorten
from kdlora.report.wording import MINUS, arm_title, of_seeds, plus_minus

_MOST_CLASSES, _MOST_PAIRS, _MOST_POINTS = 10, 12, 1200
_MOST_QUOTATIONS, _LONGEST = 8, 600
_LONGEST_MARKED, _BEFORE = 500, 80
Texts = dict[tuple[str, str], ExampleText]
_GUIDE: dict[str, Any] = {"color": PALETTE["soft"], "linestyle": "--", "linewidth": 1.2, "zorder": 1}


Runs = Sequence[Predictions]
"""Of one arm, one for each seed, of the same rows in the same order."""


def error_blocks(experiment: Experiment) -> list[Block]:
    arm, teacher, task = experiment.student_arm, experiment.teacher_arm, experiment.task
    if arm is None:
        return []
    control = (CONTROLS | {own: taught for taught, own in CONTROLS.items()}).get(arm, "")
    arms = {one: runs for one in (teacher, arm, control) if (runs := align(experiment.predictions(one)))}
    if arm not in arms:
        return [Paragraph("No predictions were kept, so there is nothing to show here.", "note")]
    if task.kind == "regression":
        return [_residual_plot(task, arm, arms[arm][0])]
    calibration = experiment.shipped.benchmark.calibration
    decided = ["fitted thresholds"] if experiment.layout.thresholds.exists() else []
    decided += ["the temperature"] if calibration and calibration.temperature != 1 else []
    told = f"These figures are without {' and '.join(decided)}, by which the shipped student answers."
    blocks: list[Block] = [Paragraph(told, "note")] if decided else []
    blocks.append(_class_table(task, arms))
    if task.kind == "tokens":
        blocks += _entity_tables(task, arm, arms[arm])
    elif task.kind == "single-label":
        blocks += _label_confusions(task, arm, arms[arm])
    return [*blocks, _calibration_plot(task, {one: runs for one, runs in arms.items() if one != control})]


def _decisions(task: Task, runs: Runs) -> list[np.ndarray]:
    return [predict_labels(task, one.decided, one.offsets) for one in runs]


def _label_confusions(task: Task, arm: str, runs: Runs) -> list[Table]:
    from sklearn.metrics import confusion_matrix  # half a second, which no training waits for

    names, said = task.label_names, _decisions(task, runs)
    counts = np.mean([confusion_matrix(runs[0].labels, one, labels=range(len(names))) for one in said], axis=0)
    if len(names) > _MOST_CLASSES:
        return _confusion_table(arm, runs, counts, names)
    rows = tuple((name, *_shares(own)) for name, own in zip(names, counts, strict=True))
    caption = f"Confusion matrix of {arm_title(arm)}: labels in rows, decisions in columns"
    note = f"Shares of a row; – where no row has the label. {of_seeds(len(runs))}"
    return [Table(caption, ("label", *names), rows, note=note, side=True)]


def _shares(counts: np.ndarray) -> list[str]:
    total = counts.sum()
    return [f"{count / total:.0%}" if total else "–" for count in counts]


def _confusion_table(arm: str, runs: Runs, counts: np.ndarray, names: Sequence[str]) -> list[Table]:
    totals = counts.sum(axis=1)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:_MOST_PAIRS]
    rows = tuple(
        (names[label], names[decision], f"{wrong:.1f}", f"{wrong / totals[label]:.0%}")
        for label, decision in (divmod(int(place), len(names)) for place in order)
        if (wrong := counts[label, decision]) > 0
    )
    columns = ("label", "taken for", "rows", "of the label's rows")
    if runs[0].offsets is not None:
        columns = ("type", "taken for", "entities", "of those that were found")
    caption = f"Most frequent confusions of {arm_title(arm)}"
    return [Table(caption, columns, rows, text_columns=2, note=of_seeds(len(runs)), side=True)] if rows else []


def _class_table(task: Task, arms: Mapping[str, Runs]) -> Table:
    counts = {arm_title(arm): count_labels(task, runs) for arm, runs in arms.items()}
    names, what = task.label_names, ("label", "rows")
    if task.kind == "tokens":
        names, what = task.label_types, ("type", "entities")
    rows: list[Row] = []
    for place, name in enumerate(names):
        for arm, own in counts.items():
            support = own[0, place, 2]
            figures = [plus_minus(mean_sd(100 * seeds)) for seeds in entity_rates(own[:, place])]
            rows.append((name, arm, str(support), *(figures if support else ["–"] * 3)))
    told = f"Per cent, mean ± standard deviation over seeds; {what[1]} are those that have the {what[0]}."
    columns = (what[0], "model", what[1], "precision", "recall", "F1")
    return Table(f"Every {what[0]}", columns, tuple(rows), text_columns=2, note=told, compact=True)


def count_labels(task: Task, runs: Runs) -> Integers:
    """Count right, predicted and wanted rows of each label, or entities of each type: (seeds, labels, 3)."""
    labels, found = runs[0].labels, []
    for one, said in zip(runs, _decisions(task, runs), strict=True):
        if task.kind == "tokens":
            found.append(counts_from_logits(task.label_names, one.decided, labels, one.offsets).sum(axis=0))
        elif task.kind == "multi-label":
            had = labels.astype(np.int64)
            found.append(np.stack([(said * had).sum(axis=0), said.sum(axis=0), had.sum(axis=0)], axis=-1))
        else:
            parts = (labels[said == labels], said, labels)
            found.append(np.stack([np.bincount(part, minlength=task.num_labels) for part in parts], axis=-1))
    return np.array(found)


def _residual_plot(task: Task, arm: str, run: Predictions) -> Figure:
    predicted, true = run.decided[:, 0].astype(float), run.labels.astype(float)
    residuals, quantity = predicted - true, shorten(task.label_names[0], 30)
    size = np.abs(residuals)
    shown = np.linspace(0, len(true) - 1, min(len(true), _MOST_POINTS)).astype(int)
    least = 1e-6 * float(np.abs(true).max()) or 1.0
    limits = padded([*true[shown].tolist(), *predicted[shown].tolist()], margin=0.05, least=least)

    def paint(axes: Any) -> None:
        axes.plot(limits, limits, **_GUIDE)
        points = list(zip(true[shown], predicted[shown], strict=True))
        scatter(axes, points, arm_style(arm), radius=3, alpha=0.4, linewidths=0)
        axes.set(xlim=limits, ylim=limits, xlabel=f"label ({quantity})", ylabel=f"prediction ({quantity})")

    said = (
        f"Mean error {MINUS if residuals.mean() < 0 else '+'}{abs(residuals.mean()):.3g}, "
        f"mean absolute error {size.mean():.3g}, "
        f"root mean squared error {np.sqrt((residuals**2).mean()):.3g}; the worst is off by {size.max():.3g}."
    )
    part = "" if len(shown) == len(true) else f" {len(shown)} of {len(true)} rows are drawn."
    caption = f"{said} One seed; on the line, prediction and label agree.{part}"
    title = f"Predictions of {arm_title(arm)} against labels"
    return draw(paint, title, said, "residuals", caption=caption, height=360)


def _calibration_plot(task: Task, arms: Mapping[str, Runs]) -> Figure:
    start = 0.5 if task.kind == "multi-label" or task.num_labels == 2 else 0.0
    errors = {
        arm: plus_minus(mean_sd([100 * _reliability(task, [one]).error for one in runs])) for arm, runs in arms.items()
    }

    def paint(axes: Any) -> None:
        axes.plot([start, 1], [start, 1], **_GUIDE)
        lowest = start
        for arm, runs in arms.items():
            pooled, style = _reliability(task, runs), arm_style(arm)
            confidence = np.maximum(pooled.confidence, start)
            sizes = (6 + 12 * np.sqrt(pooled.count / pooled.count.sum())) ** 2
            axes.plot(confidence, pooled.accuracy, color=style.colour, linewidth=2.2)
            marks = {"marker": style.marker, "edgecolors": PALETTE["card"], "zorder": 3}
            label = named(f"{arm_title(arm)}, ECE {errors[arm]}%")
            axes.scatter(confidence, pooled.accuracy, sizes, style.colour, label=label, **marks)
            lowest = min(lowest, *pooled.accuracy)
        axes.set(xlim=(start, 1.02), ylim=(np.floor(10 * lowest) / 10 - 0.03, 1.03))
        axes.set(xlabel="confidence of the decision", ylabel="share of right decisions")

    said = "; ".join(f"{arm_title(arm)} {error}%" for arm, error in errors.items())
    caption = "On the line, confidence equals accuracy. Marks grow with the share of decisions; bins of width 0.1."
    description = f"Expected calibration error: {said}."
    return draw(paint, "Calibration", description, "calibration", caption=caption, height=360)


def _reliability(task: Task, runs: Runs) -> Reliability:
    logits, labels = (np.concatenate(parts) for parts in zip(*((one.logits, one.labels) for one in runs), strict=True))
    if task.kind == "tokens":  # words that have a label, and that the model saw
        kept = (labels >= 0) & np.isfinite(logits).all(axis=1)
        logits, labels = logits[kept], labels[kept]
    return reliability(probabilities(logits, task.kind), labels, task.kind)


def example_blocks(experiment: Experiment) -> list[Block]:
    arm, task, found = experiment.student_arm, experiment.task, list[Quotation]()
    if arm is None:
        return []
    why = "the texts, or the predictions of teacher or student, were not kept"
    teacher, students = experiment.teacher_predictions, experiment.predictions(arm)
    aligned = align([teacher, *students]) if teacher and students and experiment.examples else None
    if aligned is not None:
        why = "teacher and student agree on every word" if task.kind == "tokens" else why
        found = (_span_quotations if task.kind == "tokens" else _quotations)(task, aligned, experiment.examples)
    if not found:
        return [Paragraph(f"There are no examples to show: {why}.", "note")]
    first = "Where they differ most stands first. " if len(found) > 1 else ""
    return [Paragraph(f"{first}A label may be wrong: check it."), tuple(found)]


def _quotations(task: Task, aligned: Sequence[Predictions], texts: Texts) -> list[Quotation]:
    """Quote where the first predictions, the teacher's, and the mean of the others differ most."""
    rows, logits = aligned[0], [one.logits for one in aligned]
    teacher, *softened = logits if task.kind == "regression" else [probabilities(one, task.kind) for one in logits]
    student = np.mean(softened, axis=0)
    # Jensen-Shannon is bounded: KL would put a sure student beside an unsure teacher above opposite decisions.
    middle = (teacher + student) / 2
    distance = np.abs(teacher - student).max(axis=1)
    if task.kind == "single-label":
        distance = (rel_entr(teacher, middle) + rel_entr(student, middle)).sum(axis=1)
    who = "student" if len(softened) == 1 else f"student, mean of {len(softened)} seeds"
    quotations: list[Quotation] = []
    keys = list(zip(rows.split, rows.ids, strict=True))
    for row in [row for row in np.argsort(-distance, kind="stable") if keys[row] in texts][:_MOST_QUOTATIONS]:
        example = texts[keys[row]]
        facts = {"id": rows.ids[row], "label": _label(task, rows.labels[row])}
        facts["teacher"] = _opinion(task, teacher[row], student[row])
        facts[who] = _opinion(task, student[row], teacher[row])
        pair = None if example.text_pair is None else _cut(example.text_pair)
        quotations.append(Quotation(_cut(example.text), pair, facts))
    return quotations


def _label(task: Task, label: np.ndarray) -> str:
    if task.kind == "regression":
        return f"{float(label):.6g}"
    if task.kind == "multi-label":
        names = [name for name, marked in zip(task.label_names, label, strict=True) if marked]
        return ", ".join(names) or "none"
    return task.label_names[int(label)]


def _opinion(task: Task, values: np.ndarray, other: np.ndarray) -> str:
    """Say what one side predicts; for multi-label, on the label that divides the two."""
    if task.kind == "regression":
        return f"{float(values[0]):.6g}"
    several = task.kind == "multi-label"
    column = int((np.abs(values - other) if several else values).argmax())
    return f"{task.label_names[column]}{':' if several else ','} {100 * values[column]:.0f}%"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"


OUTCOMES = ("right", "other type", "other edges", "both", "missed")
"""What becomes of an entity: found, found with another type or other edges or both, or nothing found there at all."""


def outcomes(
    task: Task, tags: Integers, labels: Integers, offsets: Integers
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Follow every entity: counts by type and outcome, by type and the type it is taken for, and those invented."""
    types, kept = len(task.label_types), labels >= 0
    found, taken = np.zeros((types, len(OUTCOMES)), np.int64), np.zeros((types, types), np.int64)
    edges = np.concatenate(([0], np.cumsum(kept)))[offsets]
    said, true = tags[kept], labels[kept]
    starts, ends = entity_bounds(said, edges)
    kinds, met = (said[starts] - 1) // 2, np.zeros(len(starts), bool)
    owner = np.full(len(said), -1)
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        owner[start:end] = place
    for start, end in zip(*entity_bounds(true, edges), strict=True):
        kind, there = (true[start] - 1) // 2, np.unique(owner[start:end])
        there = there[there >= 0]
        met[there] = True
        if not len(there):
            found[kind, OUTCOMES.index("missed")] += 1
            continue
        exact, same = (starts[there] == start) & (ends[there] == end), kinds[there] == kind
        best = int(np.argmax(2 * exact + same))
        found[kind, int(not same[best]) + 2 * int(not exact[best])] += 1
        taken[kind, kinds[there[best]]] += 1
    return found, taken, np.bincount(kinds[~met], minlength=types)


def _entity_tables(task: Task, arm: str, runs: Runs) -> list[Table]:
    counts = [outcomes(task, tags, runs[0].labels, np.asarray(runs[0].offsets)) for tags in _decisions(task, runs)]
    found, taken, invented = (np.mean(part, axis=0) for part in zip(*counts, strict=True))
    rows = tuple(
        (kind, f"{own.sum():.0f}", *_shares(own), f"{added:.1f}")
        for kind, own, added in zip(task.label_types, found, invented, strict=True)
    )
    note = (
        "An entity that is not right has another type, other edges, or both, or nothing is found where it is. Invented "
        f"are those found where none is. {of_seeds(len(runs))}"
    )
    columns = ("type", "entities", *OUTCOMES, "invented")
    table = Table(f"What becomes of entities, by {arm_title(arm)}", columns, rows, note=note)
    return [table, *_confusion_table(arm, runs, taken, task.label_types)]


def _span_quotations(task: Task, aligned: Sequence[Predictions], texts: Texts) -> list[Quotation]:
    """Quote where the entities of the first predictions, the teacher's, and of the mean of the others differ most."""
    teacher, rows = aligned[0], np.asarray(aligned[0].offsets)
    student = np.mean([probabilities(one.logits, task.kind) for one in aligned[1:]], axis=0)
    sides = {"label": teacher.labels, "teacher": decode(teacher.logits, rows), "student": decode(student, rows)}
    differs = np.add.reduceat(np.append(sides["teacher"] != sides["student"], False), rows[:-1].clip(max=rows[-1]))
    quotations: list[Quotation] = []
    for row in np.argsort(-differs, kind="stable"):
        example = texts.get((teacher.split[row], teacher.ids[row]))
        if not differs[row] or len(quotations) == _MOST_QUOTATIONS:
            break
        if example is not None and len(example.starts) == rows[row + 1] - rows[row]:
            spans = {
                side: [
                    Span(example.starts[one.start], example.ends[one.end - 1], one.type)
                    for one in spans_of(tags[rows[row] : rows[row + 1]], task.label_names)
                ]
                for side, tags in sides.items()
            }
            quotations.append(_quote(example, spans, teacher.ids[row]))
    return quotations


def _quote(example: ExampleText, spans: dict[str, list[Span]], identity: str) -> Quotation:
    """Quote a text from a little before the first span on which teacher and student differ."""
    apart = set(spans["teacher"]) ^ set(spans["student"])
    low = max(0, min((span.start for span in apart), default=0) - _BEFORE) if len(example.text) > _LONGEST_MARKED else 0
    high = min(len(example.text), low + _LONGEST_MARKED)
    marked = {side: _parts(example.text, own, low, high) for side, own in spans.items()}
    facts = {side: ", ".join(f"{text} ({kind})" for text, kind in own if kind) for side, own in marked.items()}
    text = "".join(piece for piece, _ in marked["label"])
    return Quotation(text, None, {"id": identity} | {side: told or "none" for side, told in facts.items()}, marked)


def _parts(text: str, spans: Sequence[Span], low: int, high: int) -> Pieces:
    parts, place = [("… ", "")] if low else [], low
    for span in (one for one in spans if one.end > low and one.start < high):
        start, end = max(low, span.start), min(high, span.end)
        parts += [(text[place:start], ""), (text[start:end], span.type)]
        place = end
    parts += [(text[place:high], ""), (" …" if high < len(text) else "", "")]
    return tuple(part for part in parts if part[0])
