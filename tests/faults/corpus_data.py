"""Data files that must be refused: name, content, changes of the config, parts of the message."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class DataCase:
    """One training file.

    Attributes:
        what: what is wrong with it.
        name: of the file.
        content: its bytes; None leaves it out.
        expected: parts of the message.
        changes: of the config.
    """

    what: str
    name: str
    content: bytes | None
    expected: tuple[str, ...]
    changes: Mapping[str, Any] = field(default_factory=dict)


def csv(*lines: str, header: str = "id,text,label", count: int = 20, separator: str = ",") -> bytes:
    """Give a good file with more lines at its end."""
    good = [separator.join((str(i), f"film number {i}", "ab"[i % 2])) for i in range(count)]
    return "\n".join([header, *good, *lines, ""]).encode()


def jsonl(*rows: object, count: int = 20) -> bytes:
    """Give good lines with more at the end; text is taken as it is."""
    good = [{"id": str(i), "text": f"film {i}", "label": "ab"[i % 2]} for i in range(count)]
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in [*good, *rows]).encode()


def parquet(**columns: list[Any]) -> bytes:
    """Give a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def as_text(*values: bytes) -> pa.Array:
    """Give bytes the type of text, as a writer in a careless language does."""
    return pa.array(list(values), pa.binary()).view(pa.string())


NUMBERS: dict[str, Any] = {"task": {"kind": "regression"}}
FLAGS: dict[str, Any] = {"task": {"label": ["x", "y"]}}
PARQUET = parquet(text=[f"film {i}" for i in range(20)], label=["a", "b"] * 10)

CASES = [
    DataCase("missing", "train.csv", None, ("train.csv", "does not exist", "data.train")),
    DataCase("empty", "train.csv", b"", ("train.csv", "empty")),
    DataCase("blank lines", "train.csv", b"\n\n\n", ("train.csv",)),
    DataCase("header only", "train.csv", b"id,text,label\n", ("train.csv", "no rows")),
    DataCase("one row", "train.csv", b"id,text,label\n1,a film,a\n", ("train.csv",)),
    DataCase("no header", "train.csv", csv()[14:], ("train.csv", "column")),
    DataCase("two columns of a name", "train.csv", csv(header="id,text,text"), ("train.csv", "text")),
    DataCase("a row too long", "train.csv", csv("20,a,b,c"), ("train.csv", "row 21", "4 columns where 3")),
    DataCase("a row too short", "train.csv", csv("20,a"), ("train.csv", "row 21", "2 columns where 3")),
    DataCase("a quote left open", "train.csv", csv('20,"a film,a'), ("train.csv", "quote")),
    DataCase("not UTF-8", "train.csv", csv() + b"20,caf\xe9,a\n", ("train.csv", "line 22", "UTF-8")),
    DataCase("UTF-16", "train.csv", csv().decode().encode("utf-16"), ("train.csv", "UTF-8")),
    DataCase("a zero byte in a TSV", "train.tsv", b"\x00\x01\x02", ("train.tsv",)),
    DataCase(
        "quotes in a TSV",
        "train.tsv",
        csv(header="id\ttext\tlabel", separator="\t") + b'20\t"a ""b"" c"\ta\n',
        ("train.tsv",),
    ),
    DataCase("text missing", "train.csv", csv("20,,a"), ("train.csv", "row 21", "text")),
    DataCase("text blank", "train.csv", csv("20,   ,a"), ("train.csv", "row 21", "text")),
    DataCase("label missing", "train.csv", csv("20,a film,"), ("train.csv", "row 21", "label")),
    DataCase("id missing", "train.csv", csv(",a film,a"), ("train.csv", "row 21", "id")),
    DataCase("id twice", "train.csv", csv("3,a film,a"), ("train.csv", "'3'")),
    DataCase("one class", "train.csv", csv().replace(b",b\n", b",a\n"), ("one class only", "task.label")),
    DataCase("a column misspelt", "train.csv", csv(), ("'txt'", "task.text", "'text'"), {"task": {"text": "txt"}}),
    DataCase("a label misspelt", "train.csv", csv(), ("'lable'", "task.label"), {"task": {"label": "lable"}}),
    DataCase("no id column", "train.csv", csv(), ("key",), {"data": {"id_column": "key"}}),
    DataCase(
        "text is the label", "train.csv", csv(), ("both text and label",), {"task": {"text": "label", "label": "label"}}
    ),
    DataCase("names left out", "train.csv", csv(), ("'b'", "label_names"), {"task": {"label_names": ["a", "c"]}}),
    DataCase(
        "names too many",
        "train.csv",
        csv(),
        ("3 names",),
        {"task": {"label_names": ["a", "b", "c"], "kind": "regression"}},
    ),
    DataCase("numbers wanted", "train.csv", csv(), ("train.csv", "row 1", "'a'"), NUMBERS),
    DataCase(
        "not a number",
        "train.csv",
        csv().replace(b",a\n", b",1\n").replace(b",b\n", b",2\n") + b"20,x,nan\n",
        ("row 21",),
        NUMBERS,
    ),
    DataCase(
        "infinite",
        "train.csv",
        csv().replace(b",a\n", b",1\n").replace(b",b\n", b",2\n") + b"20,x,1e999\n",
        ("row 21",),
        NUMBERS,
    ),
    DataCase(
        "all numbers alike",
        "train.csv",
        csv().replace(b",a\n", b",1\n").replace(b",b\n", b",1\n"),
        ("regression needs different values",),
        NUMBERS,
    ),
    DataCase("flags of 2", "train.jsonl", jsonl({"text": "t", "x": 2, "y": 0}, count=0), ("row 1", "'x'"), FLAGS),
    DataCase(
        "flags without any",
        "train.jsonl",
        jsonl(*[{"text": f"t{i}", "x": 0, "y": 0} for i in range(20)], count=0),
        ("no training row has any label",),
        FLAGS,
    ),
    DataCase("flags missing", "train.jsonl", jsonl({"text": "t", "x": 1}, count=0), ("'y'",), FLAGS),
    DataCase("broken JSON", "train.jsonl", jsonl('{"text": '), ("train.jsonl", "line 21", "not JSON")),
    DataCase("a list as a line", "train.jsonl", jsonl([1, 2]), ("train.jsonl", "line 21", "list")),
    DataCase("a number as a line", "train.jsonl", jsonl(3), ("train.jsonl", "line 21", "int")),
    DataCase("null text", "train.jsonl", jsonl({"id": "x", "text": None, "label": "a"}), ("row 21", "text")),
    DataCase("a number as text", "train.jsonl", jsonl({"id": "x", "text": 3, "label": "a"}), ("row 21", "text")),
    DataCase("a list as text", "train.jsonl", jsonl({"id": "x", "text": ["a"], "label": "a"}), ("row 21", "text")),
    DataCase(
        "an object as label", "train.jsonl", jsonl({"id": "x", "text": "t", "label": {"a": 1}}), ("row 21", "label")
    ),
    DataCase("a null label", "train.jsonl", jsonl({"id": "x", "text": "t", "label": None}), ("row 21", "label")),
    DataCase("a huge number", "train.jsonl", jsonl('{"id": 1' + "0" * 5000 + "}"), ("train.jsonl", "line 21")),
    DataCase("nested too deep", "train.jsonl", jsonl("[" * 100_000), ("train.jsonl", "line 21", "nested")),
    DataCase("an array nested too deep", "train.json", b"[" * 100_000, ("train.json", "nested")),
    DataCase(
        "half a character",
        "train.jsonl",
        jsonl('{"id": "x", "text": "\\ud800", "label": "a"}'),
        ("train.jsonl", "row 21"),
    ),
    DataCase(
        "half a character as id",
        "train.jsonl",
        jsonl('{"id": "\\ud800", "text": "x", "label": "a"}'),
        ("train.jsonl", "row 21"),
    ),
    DataCase("an array cut off", "train.json", b'[{"text": "a"}', ("train.json", "not JSON")),
    DataCase("an empty array", "train.json", b"[]", ("train.json",)),
    DataCase("an array of numbers", "train.json", b"[1]", ("train.json", "row 1")),
    DataCase("Parquet cut off", "train.parquet", PARQUET[:-20], ("train.parquet", "Parquet")),
    DataCase("Parquet of nothing", "train.parquet", b"PAR1", ("train.parquet", "Parquet")),
    DataCase("Parquet damaged", "train.parquet", PARQUET[:40] + bytes(60) + PARQUET[100:], ("train.parquet",)),
    DataCase(
        "Parquet with a column name that is not UTF-8",
        "train.parquet",
        PARQUET.replace(b"label", b"l\xffbel"),
        ("train.parquet", "UTF-8"),
    ),
    DataCase(
        "Parquet with a text that is not UTF-8",
        "train.parquet",
        parquet(text=as_text(*[b"a film", b"a fil\xff", b"films", b"film"] * 5), label=["a", "b"] * 10),
        ("train.parquet", "UTF-8"),
    ),
    DataCase(
        "Parquet with a label that is not UTF-8",
        "train.parquet",
        parquet(text=[f"film {i}" for i in range(20)], label=as_text(*[b"a", b"b\xff"] * 10)),
        ("train.parquet", "UTF-8"),
    ),
    DataCase(
        "Parquet without rows",
        "train.parquet",
        parquet(text=pa.array([], pa.string()), label=pa.array([], pa.string())),
        ("train.parquet", "no rows"),
    ),
    DataCase(
        "Parquet of numbers",
        "train.parquet",
        parquet(text=[1, 2, 3, 4], label=["a", "b"] * 2),
        ("train.parquet", "text"),
    ),
    DataCase(
        "Parquet of dates",
        "train.parquet",
        parquet(text=["a"] * 4, label=pa.array([1, 2, 3, 4], pa.timestamp("s"))),
        ("train.parquet", "label"),
    ),
    DataCase(
        "Parquet with nulls",
        "train.parquet",
        parquet(text=["a", None, "b", "c"], label=["a", "b"] * 2),
        ("row 2", "text"),
    ),
    DataCase("a spreadsheet", "train.xlsx", b"PK\x03\x04", ("train.xlsx", "unknown kind of file")),
    DataCase("compressed", "train.csv.gz", b"\x1f\x8b", ("train.csv.gz", "unknown kind of file")),
    DataCase("without an ending", "train", csv(), ("unknown kind of file",)),
    DataCase("Parquet called CSV", "train.csv", PARQUET, ("train.csv",)),
    DataCase("CSV called Parquet", "train.parquet", csv(), ("train.parquet", "Parquet")),
    DataCase(
        "no such test file", "train.csv", csv(), ("tset.csv", "data.test"), {"data": {"test": "/nowhere/tset.csv"}}
    ),
    DataCase("a folder", "train.csv", csv(), ("folder",), {"data": {"test": "/tmp"}}),
    DataCase(
        "too few rows used",
        "train.csv",
        csv(),
        ("one class only", "max_train_examples"),
        {"data": {"max_train_examples": 1}},
    ),
    DataCase("a device", "train.csv", csv(), ("/dev/null",), {"data": {"test": "/dev/null"}}),
]
