"""What becomes of entities, and sentences with the spans of the labels, the teacher and the student marked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kdlora.data.tags import Integers, Span, decode, entity_bounds, spans_of
from kdlora.data.tasks import Task
from kdlora.evidence.metrics import probabilities
from kdlora.evidence.predictions import ExampleText, Predictions
from kdlora.report.page import Marked, Quotation, Table
from kdlora.report.wording import of_seeds

OUTCOMES = ("right", "other type", "other edges", "both", "missed")
"""What becomes of an entity: found, found with another type or other edges or both, or nothing found there at all."""
_LONGEST, _BEFORE = 500, 80


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


def outcome_table(task: Task, name: str, counts: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Table:
    """List what becomes of each type's entities, as shares of them; counts are of each seed."""
    found, invented = (np.mean([one[place] for one in counts], axis=0) for place in (0, 2))
    totals = found.sum(axis=1)
    rows = tuple(
        (kind, f"{totals[row]:.0f}", *(_share(value, totals[row]) for value in found[row]), f"{invented[row]:.1f}")
        for row, kind in enumerate(task.label_types)
    )
    note = (
        "An entity that is not right has another type, other edges, or both, or nothing is found where it is. Invented "
        f"are those found where none is. {of_seeds(len(counts))}"
    )
    columns = ("type", "entities", *OUTCOMES, "invented")
    return Table(f"What becomes of entities, by {name}", columns, rows, note=note)


def _share(value: float, total: float) -> str:
    return f"{100 * value / total:.0f}%" if total else "–"


def span_quotations(
    task: Task, aligned: Sequence[Predictions], texts: dict[tuple[str, str], ExampleText], most: int
) -> list[Quotation]:
    """Quote where the entities of the first predictions, the teacher's, and of the mean of the others differ most."""
    teacher, rows = aligned[0], aligned[0].offsets
    if rows is None or teacher.labels is None:
        return []
    student = np.mean([probabilities(one.logits, task.kind) for one in aligned[1:]], axis=0)
    sides = {"label": teacher.labels, "teacher": decode(teacher.logits, rows), "student": decode(student, rows)}
    differs = np.add.reduceat(np.append(sides["teacher"] != sides["student"], False), rows[:-1].clip(max=rows[-1]))
    quotations: list[Quotation] = []
    for row in np.argsort(-differs, kind="stable"):
        example = texts.get((teacher.split[row], teacher.ids[row]))
        if not differs[row] or len(quotations) == most:
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
    low = max(0, min((span.start for span in apart), default=0) - _BEFORE) if len(example.text) > _LONGEST else 0
    high = min(len(example.text), low + _LONGEST)
    facts = {
        side: ", ".join(f"{example.text[one.start : one.end]} ({one.type})" for one in own) or "none"
        for side, own in spans.items()
    }
    text = "… " * (low > 0) + example.text[low:high] + " …" * (high < len(example.text))
    marked = tuple(Marked(side, _parts(example.text, own, low, high)) for side, own in spans.items())
    return Quotation(text, None, {"id": identity} | facts, marked)


def _parts(text: str, spans: Sequence[Span], low: int, high: int) -> tuple[tuple[str, str], ...]:
    """Cut a stretch of a text into pieces, each with its type or none."""
    parts, place = [("… ", "")] if low else [], low
    for span in spans:
        if span.end > low and span.start < high:
            parts += [
                (text[place : max(low, span.start)], ""),
                (text[max(low, span.start) : min(high, span.end)], span.type),
            ]
            place = min(high, span.end)
    parts += [(text[place:high], ""), (" …" if high < len(text) else "", "")]
    return tuple(part for part in parts if part[0])
