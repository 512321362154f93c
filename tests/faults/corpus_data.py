"""Data files that must be refused: name, content, changes of the config, parts of the message."""

import io
import json
from collections.abc import Mapping, Sequence
from csv import writer as csv_writer
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


@dataclass(frozen=True)
class DataCase:
    """A training file: its name and bytes (None leaves it out), parts of the message, changes of the config."""

    name: str
    content: bytes | None
    expected: tuple[str, ...]
    changes: Mapping[str, Any]


def file(ending: str, content: bytes | str | None, *expected: str, **changes: Any) -> DataCase:
    """A file that the message names."""
    name = f"train.{ending}"
    return DataCase(name, content.encode() if isinstance(content, str) else content, (name, *expected), changes)


def csv(*lines: str, header: str = "id,text,label", count: int = 20, separator: str = ",") -> bytes:
    """Give a good file with more lines at its end."""
    good = [separator.join((str(i), f"film number {i}", "ab"[i % 2])) for i in range(count)]
    return "\n".join([header, *good, *lines, ""]).encode()


def csv_line(line: str, *expected: str) -> DataCase:
    """A CSV file whose last line, of row 21, is wrong."""
    return file("csv", csv(line), "row 21", *expected)


def json_line(line: str | list[int] | Mapping[str, Any], *expected: str) -> DataCase:
    """JSON Lines whose last line is wrong; an object has an id, a text and a label where it names no others."""
    good = [{"id": str(i), "text": f"film {i}", "label": "ab"[i % 2]} for i in range(20)]
    last = {"id": "x", "text": "t", "label": "a", **line} if isinstance(line, Mapping) else line
    lines = [*map(json.dumps, good), last if isinstance(last, str) else json.dumps(last)]
    return file("jsonl", "\n".join([*lines, ""]), *expected)


def settings(*expected: str, content: bytes | None = None, **changes: Any) -> DataCase:
    """A good file whose columns, splits or labels the config takes for others; the message names the key."""
    return DataCase("train.csv", csv() if content is None else content, expected, changes)


def table(**columns: Sequence[object]) -> bytes:
    """Give a CSV file of these columns."""
    lines = io.StringIO(newline="")
    writer = csv_writer(lines)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return lines.getvalue().encode()


def parquet(**columns: Any) -> bytes:
    """Give a Parquet file of twenty texts and labels, but for the columns given."""
    buffer = io.BytesIO()
    texts, labels = [f"film {i}" for i in range(20)], ["a", "b"] * 10
    pq.write_table(pa.table({"text": texts, "label": labels} | columns), buffer)
    return buffer.getvalue()


def as_text(*values: bytes) -> pa.Array:
    """Give bytes the type of text, as a writer in a careless language does."""
    return pa.array(list(values), pa.binary()).view(pa.string())


TEXTS = [f"text {row}" for row in range(20)]
AB = ["a", "b"] * 10
BOTH = table(text=TEXTS, x=[0, 1] * 10, y=[0, 1] * 10)
FORTY = [f"t{row}" for row in range(40)]
NUMBERS: dict[str, Any] = {"kind": "regression"}
FLAGS: dict[str, Any] = {"label": ["x", "y"]}
TABS = csv(header="id\ttext\tlabel", separator="\t")
WORDS = "Ann\tB-PER\nran\tO\n\n" * 20
LATIN = "id,text,label\n1,fine,a\n2,caf\xe9,b\n"

CASES = [
    file("csv", None, "does not exist", "data.train"),
    # An interrupted download, or a header alone, must not become a data set of no examples.
    *(file(ending, b"", "is empty") for ending in ("csv", "tsv", "jsonl", "parquet")),
    file("csv", "\n\n\n", "blank lines"),
    file("csv", "id,text,label\n", "no rows"),
    file("csv", "id,text,label\n1,a film,a\n"),
    file("csv", csv()[14:], "column"),  # no header
    # Of two columns of one name, the wrong one would be learnt.
    file("csv", csv(header="id,text,text"), "two columns named 'text'"),
    # Skipping or padding ragged rows loses data, or puts text into the label.
    csv_line("20,a,b,c", "4 columns where 3 are expected", "Put quotes"),
    csv_line("20,a", "2 columns where 3"),
    # `cat a.csv b.csv` made a class named `label` of one row, for whose sake all others counted less.
    csv_line("id,text,label", "repeats the header", "remove the line"),
    file("csv", "text,label\na,1\n\nwell, no,0\n", "row 2:", "3 columns where 2 are"),
    file("tsv", TABS + b"20\ta\n", "row 21", "2 columns where 3 are expected", "without quoting"),
    # One stray quote swallows all rows after it into a single text.
    file("csv", csv('20,"a film,a'), "row 21", "end of data", "'20,", "Close each quote"),
    file(
        "csv",
        csv('20,"a film, so', "21,b,b", '22,"fine" they said,a'),
        "row 21: not",
        "in line 24; the row is '20,",
    ),
    file("csv", 'label,text\n1,a\n0,"b\n1,c\n1,d\n', "line 3", "Close each quote"),
    # Latin-1 bytes that are replaced or skipped change texts without a word.
    file("csv", LATIN.encode("latin-1"), "UTF-8", "line 3", "0xE9", "windows-1252"),
    file("jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2", "UTF-8"),
    file("csv", csv().decode().encode("utf-16"), "line 1", "or utf-16"),
    file("tsv", b"\x00\x01\x02"),
    # With CSV's quoting one stray quote swallows rows, without it is a character. Never half of each.
    file("tsv", TABS + b'20\t"a text\nin two lines"\ta\n'),
    # A blank text is learnt as "no words mean this label"; the second such row is counted.
    *(
        file("csv", table(text=[*TEXTS[:18], text, text], label=AB), "row 19: the text 'text' is empty (1 more such")
        for text in ("", "  \t", "\u00a0\u3000", "\ufeff")
    ),
    file("csv", table(sentence1=TEXTS, sentence2=[*TEXTS[:19], ""], label=AB), "row 20: the text 'sent"),
    csv_line(",a film,a", "the id ('id') is empty"),
    # White space that becomes a class of its own is predicted, too.
    csv_line("20,a film, ", "no label in column 'label' (1 of 21 rows)"),
    # Two rows with one id share teacher logits: one of them learns from another text.
    csv_line("3,a film,a", "the id '3' ('id') is also that of row 4;", "data.id_column"),
    # An export that has no unique id, but a column of that name, is at a dead end without the way out.
    file("csv", csv("3,a film,a", "5,a film,b"), "(1 more such ids)", "without a column 'id'"),
    # A model of one class, or of one value, is right on every row that it has seen.
    settings("one class only (a)", "task.label", content=csv().replace(b",b\n", b",a\n")),
    settings("task.label_names names 'a' alone", "two labels", task={"label_names": ["a"]}),
    settings("every training label is 2.5", content=table(text=TEXTS, label=[2.5] * 20), task=NUMBERS),
    # The wrong column that happens to exist would be learnt without an error; the right name has to be suggested.
    settings("no column 'txt' (task.text)", "it has 'id', 'text'", "Did you mean 'text'?", task={"text": "txt"}),
    settings("no column 'lable' (task.label)", "Did you mean 'label'", task={"label": "lable"}),
    settings("key", "data.id_column", data={"id_column": "key"}),
    settings("names the column 'text' twice", task={"text": ["text", "text"]}),
    settings("both text and label", task={"text": "label", "label": "label"}),
    # A guess between two columns is right half the time and never seen.
    settings(
        "Set task.text (--text); the columns are 'first', 'last', 'label'",
        content=table(first=TEXTS, last=TEXTS, label=AB),
    ),
    settings("may be text or review; set task.text (--text)", content=table(text=TEXTS, review=TEXTS, label=AB)),
    settings("Set task.label (--label); the columns are", content=table(text=TEXTS, outcome=AB, other=AB)),
    settings("3 names", task={"label_names": ["a", "b", "c"], "kind": "regression"}),
    # Ids or prices taken for classes give a classifier of thousands of labels; one "n/a" must not make one either.
    settings("40 different integers", "set task.kind to single-label", content=table(text=FORTY, label=range(40))),
    settings("with a comma ('1,5')", "as in 0.5", content=table(text=TEXTS, label=["1,5", "1", "2", "2,5"] * 5)),
    settings("'0,5', but a number", "as in 0.5", content=table(text=TEXTS, label=["0,5", "1"] * 10), task=NUMBERS),
    settings("whole numbers as decimals", content=table(text=FORTY, label=[1.0, 2.0] * 20)),
    settings("40 texts in 40 rows", content=table(text=FORTY, label=FORTY)),
    settings(
        "row 17",
        "'n/a', other rows have numbers",
        content=table(text=TEXTS, label=[*(f"{row}.5" for row in range(16)), "n/a", "1.5", "2.5", "3.5"]),
    ),
    # One NaN among the targets makes every weight NaN.
    file("csv", csv(), "row 1", "'a'", task=NUMBERS),
    *(
        file("csv", table(text=TEXTS, label=[0.5, 1.5] * 8 + [value] + [2, 3, 4]), "row 17: ", expected, task=NUMBERS)
        for expected, values in {"finite": ("nan", "1e60"), "number": ("much",), "no label": ("", "  ")}.items()
        for value in values
    ),
    # A 2 in a 0/1 column gives a loss below zero.
    file("csv", table(text=TEXTS, x=[0, 1] * 10, y=[0, 1] * 9 + [2, 0]), "row 19: 'y' is '2'", "0 and 1", task=FLAGS),
    file("csv", table(text=TEXTS, x=[0, 1] * 10, y=[0, 1] * 9 + ["", 0]), "row 19: no label in column 'y'", task=FLAGS),
    settings("no training row has any label", content=table(text=TEXTS, x=[0] * 20, y=[0] * 20), task=FLAGS),
    settings("need the same names", content=BOTH, task=FLAGS | {"label_names": ["x", "z"]}),
    settings("name one", content=BOTH, task=FLAGS | {"kind": "single-label"}),
    settings("expected a list of label names", task={"kind": "multi-label"}),
    # Positions that are read as names: a student answered `0` where the first label is absent.
    file("parquet", parquet(label=[["1", "0"], ["0", "0"]] * 10), "lists of 0 and 1 as text; write label names"),
    file("parquet", parquet(label=[[0], [1]] * 10), "lists of one number; write the class as a plain value"),
    # Each combination would be a class of its own.
    settings("several labels in one ('a;b')", content=table(text=TEXTS, label=["a", "b", "", "a;b", "a; c"] * 4)),
    settings(
        "holds percentages ('85%'); write them without the sign", content=table(text=TEXTS, label=["85%", "7.5 %"] * 10)
    ),
    # One row cannot be divided into training and validation.
    settings("each has a label that no other has", content=table(text=TEXTS[:3], label=["a", "b", "c"])),
    # A broken line that is skipped shifts every id after it.
    json_line('{"text": ', "line 21: not JSON"),
    json_line([1, 2], "line 21: expected a JSON object", "list"),
    json_line({"text": None}, "row 21", "text"),
    json_line({"text": 3}, "row 21: 'text' is int"),
    json_line('{"id": 1' + "0" * 5000 + "}", "line 21"),
    json_line("[" * 100_000, "line 21", "nested"),
    json_line('{"id": "x", "text": "\\ud800", "label": "a"}', "row 21"),
    file("json", '[{"text": "a"}', "not JSON"),
    file("json", b"[1]", "row 1"),
    file("jsonl", '[{"text": "a"}, 3]', "row 2: expected a JSON object"),
    file("parquet", b"PAR1", "Parquet"),
    file("parquet", parquet()[:40] + bytes(60) + parquet()[100:]),  # damaged
    file("parquet", parquet().replace(b"label", b"l\xffbel"), "UTF-8"),
    file("parquet", parquet(text=as_text(*[b"a film", b"a fil\xff", b"films", b"film"] * 5)), "UTF-8"),
    file("parquet", parquet(label=as_text(*[b"a", b"b\xff"] * 10)), "UTF-8"),
    file("parquet", parquet(text=list(range(20))), "text"),
    file("parquet", parquet(text=["a", None, "b", "c"] * 5), "row 2", "text"),
    file("xlsx", b"PK\x03\x04", "unknown kind of file", ".csv, .tsv, .jsonl, .json, .parquet"),
    file("tsv", "Ada\tB-PER\nmet\tO\n", "needs the extension .conll"),
    DataCase("train", csv(), ("unknown kind of file",), {}),
    file("parquet", csv(), "no readable Parquet"),
    # `tests/data/test_tags.py` has the other files of words and spans.
    DataCase("train.conll", WORDS.replace("B-PER", "O").encode(), ("holds no entity",), {}),
    settings("cannot be split", content=b"text,label\nt,0.5\n"),
    settings("tset.csv", "data.test", data={"test": "/nowhere/tset.csv"}),
    settings("folder", data={"test": "/tmp"}),
    settings("one class only", "max_train_examples", data={"max_train_examples": 1}),
]
