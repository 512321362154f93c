"""Write the sets of the benchmark `strangers` as the files that a stranger would have."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from strangers_plan import DataSet, Plan

from kdlora.data.load import draw_rows

Row = dict[str, Any]


def write_sets(plan: Plan, sources: Sequence[Path], folder: Path) -> None:
    """Write each set's training files, test file and the like; the same plan gives the same bytes."""
    for name, own in plan.sets.items():
        train = _read_all(own, own.train, sources)
        if own.test is None:
            train, test = _draw_test(own, train, plan.draw_seed)
        else:
            test = _read_all(own, own.test, sources)
        train, test = (_mix(own, _join(own, rows)) for rows in (_cut(own, train, plan.draw_seed), test))
        _write(folder / name / f"test.{own.format}", own, test)
        if own.validation is not None:
            rows = _mix(own, _join(own, _read_all(own, own.validation, sources)))
            _write(folder / name / f"validation.{own.format}", own, rows)
        taken: set[int] = set()
        for limit in {own.limit(pair.rows): None for pair in plan.pairs.values() if name in pair.sets}:
            drawn = _draw(own, train, limit, plan.draw_seed)
            taken |= set(drawn)
            _write(folder / name / own.train_file(limit), own, [train[row] for row in drawn])
            print(f"{name}: {len(drawn)} of {len(train)} training rows, {len(test)} test rows", flush=True)
        rest = [{column: row[column] for column in own.text} for place, row in enumerate(train) if place not in taken]
        if rest and own.columns:
            _write(folder / name / f"unlabelled.{own.format}", own, rest)


def _read_all(own: DataSet, sources: str | Sequence[str], folders: Sequence[Path]) -> list[Row]:
    """Read one file or several."""
    return [row for name in ([sources] if isinstance(sources, str) else sources) for row in _read(own, name, folders)]


def _read(own: DataSet, source: str, folders: Sequence[Path]) -> list[Row]:
    """Read a file's columns under their names here; a row that lacks one of them is left out."""
    file = next((folder / source for folder in folders if (folder / source).is_file()), None)
    if file is None:
        raise SystemExit(f"there is no {source} in {' or '.join(map(str, folders))}; check --data and --models")
    if own.format == "conll":
        sentences = re.split(r"\n\s*\n", file.read_text(encoding="utf-8").strip("\n"))
        return [{"sentence": _with_case(lines) if own.show_case else lines} for lines in sentences]
    quoted = file.suffix == ".csv"
    with file.open(encoding="utf-8-sig", newline="" if quoted else None) as lines:
        dialect = {} if quoted else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        table = list(csv.reader(lines, **dialect))
    header = table.pop(0) if own.header else []
    places = {name: header.index(place) if isinstance(place, str) else place for name, place in own.columns.items()}
    if own.group is not None:
        places = {"group": own.group, **places}
    rows = [
        {name: line[place].strip() for name, place in places.items()}
        for line in table
        if len(line) > max(places.values()) and all(line[place].strip() for place in places.values())
    ]
    if len(rows) < len(table):
        print(f"{source}: {len(table) - len(rows)} of {len(table)} rows lack a text or a label", flush=True)
    return [{**row, own.label: own.names.get(row[own.label], own.rest or row[own.label])} for row in rows]


def _with_case(sentence: str) -> str:
    """Mark the words that have capitals, for encoders that read lower case."""
    words = [line.partition("\t") for line in sentence.splitlines()]
    marks = ["^" * (word[:1].isupper() + (len(word) > 1 and word.isupper())) for word, _, _ in words]
    return "\n".join(f"{word}{mark}\t{tag}" for (word, _, tag), mark in zip(words, marks, strict=True))


def _cut(own: DataSet, rows: list[Row], seed: int) -> list[Row]:
    """Draw as many rows of a class as the set declares; their order stays."""
    draw, left, counts = np.random.default_rng(seed), set(range(len(rows))), own.cut
    if own.tail is not None:
        had = Counter(row[own.label] for row in rows)
        wanted = np.geomspace(max(had.values()), own.tail, len(had)).round()
        counts = {
            label: min(had[label], int(count))
            for label, count in zip(draw.permutation(sorted(had)), wanted, strict=True)
        }
    for label, count in counts.items():
        places = [place for place, row in enumerate(rows) if row[own.label] == label]
        if len(places) < count:
            raise SystemExit(f"{own.train} has {len(places)} rows of {label!r}, fewer than the {count} of the plan")
        left -= {places[place] for place in draw.permutation(len(places))[count:]}
    return [rows[place] for place in sorted(left)]


def _join(own: DataSet, rows: list[Row]) -> list[Row]:
    """Make one text of several of a class."""
    if own.join == 1:
        return rows
    (column,) = own.text
    texts: dict[str, list[str]] = {}
    for row in rows:
        texts.setdefault(row[own.label], []).append(row[column])
    return [
        {column: ". ".join(mine[start : start + own.join]), own.label: label}
        for label, mine in texts.items()
        for start in range(0, len(mine), own.join)
    ]


def _mix(own: DataSet, rows: list[Row]) -> list[Row]:
    """Put up to so many texts of different classes together, as people ask for several things at once."""
    if own.mixed == 1:
        return rows
    draw, mixed = np.random.default_rng(0), []
    (column,) = own.text
    for row in rows:
        parts = {row[own.label]: row[column]}
        for other in draw.integers(len(rows), size=draw.integers(own.mixed)):
            parts.setdefault(rows[other][own.label], rows[other][column])
        labels = [label for label in parts if not own.kept or label in own.kept]
        mixed.append({column: ", and ".join(parts.values()), own.label: labels})
    return mixed


def _draw_test(own: DataSet, rows: list[Row], seed: int) -> tuple[list[Row], list[Row]]:
    """Draw test rows; rows of one group stay together."""
    names = [row.get("group", str(place)).partition("_")[0] for place, row in enumerate(rows)]
    groups = list(dict.fromkeys(names))
    drawn = draw_rows(len(groups), own.test_share, seed)
    chosen = {groups[place] for place in drawn}
    sides = [[row for row, name in zip(rows, names, strict=True) if (name in chosen) is side] for side in (False, True)]
    return sides[0], sides[1]


def _draw(own: DataSet, rows: list[Row], limit: int | None, seed: int) -> list[int]:
    """Draw training rows, classes in their proportions."""
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    labels = [row[own.label] for row in rows] if own.columns and own.mixed == 1 else []
    classes = None if not labels or _numbers(labels) else np.unique(labels, return_inverse=True)[1]
    return sorted(draw_rows(len(rows), limit / len(rows), seed, classes).tolist())


def _write(file: Path, own: DataSet, rows: list[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if own.format == "conll":
        file.write_text("\n\n".join(row["sentence"] for row in rows) + "\n", encoding="utf-8")
        return
    frame = pd.DataFrame(rows, columns=[column for column in own.columns if column in rows[0]])
    if own.format == "csv":
        frame.to_csv(file, index=False, lineterminator="\r\n")
        return
    if own.label in frame and own.mixed == 1 and (numbers := _numbers(frame[own.label])):
        frame[own.label] = numbers
    frame.to_json(file, orient="records", lines=True, force_ascii=False)


def _numbers(labels: Sequence[str]) -> list[float]:
    """Read labels as numbers; nothing where one is none."""
    try:
        return [float(label) for label in labels]
    except ValueError:
        return []
