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
    """A training file: what is wrong with it, its name and bytes (None leaves it out), the message, the config."""

    what: str
    name: str
    content: bytes | None
    expected: tuple[str, ...]
    changes: Mapping[str, Any]


def file(what: str, ending: str, content: bytes | str | None, *expected: str, **changes: Any) -> DataCase:
    """A file that the message names."""
    name = f"train.{ending}"
    return DataCase(what, name, content.encode() if isinstance(content, str) else content, (name, *expected), changes)


def csv(*lines: str, header: str = "id,text,label", count: int = 20, separator: str = ",") -> bytes:
    """Give a good file with more lines at its end."""
    good = [separator.join((str(i), f"film number {i}", "ab"[i % 2])) for i in range(count)]
    return "\n".join([header, *good, *lines, ""]).encode()


def csv_line(what: str, line: str, *expected: str) -> DataCase:
    """A CSV file whose last line, of row 21, is wrong."""
    return file(what, "csv", csv(line), "row 21", *expected)


def json_line(what: str, line: str | list[int] | Mapping[str, Any], *expected: str) -> DataCase:
    """JSON Lines whose last line is wrong; an object has an id, a text and a label where it names no others."""
    good = [{"id": str(i), "text": f"film {i}", "label": "ab"[i % 2]} for i in range(20)]
    last = {"id": "x", "text": "t", "label": "a", **line} if isinstance(line, Mapping) else line
    lines = [*map(json.dumps, good), last if isinstance(last, str) else json.dumps(last)]
    return file(what, "jsonl", "\n".join([*lines, ""]), *expected)


def settings(what: str, *expected: str, content: bytes | None = None, **changes: Any) -> DataCase:
    """A good file whose columns, splits or labels the config takes for others; the message names the key."""
    return DataCase(what, "train.csv", csv() if content is None else content, expected, changes)


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
    file("missing", "csv", None, "does not exist", "data.train"),
    # An interrupted download, or a header alone, must not become a data set of no examples.
    *(file(f"an empty {ending}", ending, b"", "is empty") for ending in ("csv", "tsv", "jsonl", "parquet")),
    file("blank lines", "csv", "\n\n\n", "blank lines"),
    file("header only", "csv", "id,text,label\n", "no rows"),
    file("one row", "csv", "id,text,label\n1,a film,a\n"),
    file("no header", "csv", csv()[14:], "column"),
    # Of two columns of one name, the wrong one would be learnt.
    file("two columns of a name", "csv", csv(header="id,text,text"), "two columns named 'text'"),
    # Skipping or padding ragged rows loses data, or puts text into the label.
    csv_line("a row too long", "20,a,b,c", "4 columns where 3 are expected", "Put quotes"),
    csv_line("a row too short", "20,a", "2 columns where 3"),
    file("a row after a blank line", "csv", "text,label\na,1\n\nwell, no,0\n", "row 2:", "3 columns where 2 are"),
    file(
        "a TSV row too short", "tsv", TABS + b"20\ta\n", "row 21", "2 columns where 3 are expected", "without quoting"
    ),
    # One stray quote swallows all rows after it into a single text.
    file("a quote left open", "csv", csv('20,"a film,a'), "row 21", "never closed", "'a film"),
    file("a quote at the last column", "csv", 'label,text\n1,a\n0,"b\n1,c\n1,d\n', "never closed", "'b"),
    # Latin-1 bytes that are replaced or skipped change texts without a word.
    file("not UTF-8", "csv", LATIN.encode("latin-1"), "UTF-8", "line 3", "offset 28 ", "0xE9"),
    file("JSON not UTF-8", "jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "line 2", "UTF-8"),
    file("UTF-16", "csv", csv().decode().encode("utf-16"), "UTF-16"),
    file("a zero byte in a TSV", "tsv", b"\x00\x01\x02"),
    # With CSV's quoting one stray quote swallows rows, without it is a character. Never half of each.
    file("two lines in quotes in a TSV", "tsv", TABS + b'20\t"a text\nin two lines"\ta\n'),
    # A blank text is learnt as "no words mean this label"; the second such row is counted.
    *(
        file(
            f"{text!r} as text",
            "csv",
            table(text=[*TEXTS[:18], text, text], label=AB),
            "row 19: the text 'text' is empty (1 more such rows)",
        )
        for text in ("", "  \t", "\u00a0\u3000", "\ufeff")
    ),
    file("half a pair", "csv", table(sentence1=TEXTS, sentence2=[*TEXTS[:19], ""], label=AB), "row 20: the text 'sent"),
    csv_line("id missing", ",a film,a", "the id ('id') is empty"),
    # Two rows with one id share teacher logits: one of them learns from another text.
    csv_line("id twice", "3,a film,a", "the id '3' ('id') is also that of row 4;", "data.id_column"),
    # An export that has no unique id, but a column of that name, is at a dead end without the way out.
    file("two ids twice", "csv", csv("3,a film,a", "5,a film,b"), "(1 more such ids)", "without a column 'id'"),
    # A model of one class, or of one value, is right on every row that it has seen.
    settings("one class", "one class only (a)", "task.label", content=csv().replace(b",b\n", b",a\n")),
    settings(
        "one value",
        "regression needs different values",
        "every training label is 2.5",
        content=table(text=TEXTS, label=[2.5] * 20),
        task=NUMBERS,
    ),
    # The wrong column that happens to exist would be learnt without an error; the right name has to be suggested.
    settings(
        "a column misspelt",
        "no column 'txt' (task.text)",
        "it has 'id', 'text', 'label'",
        "Did you mean 'text'?",
        task={"text": "txt"},
    ),
    settings(
        "a label misspelt", "no label column 'lable' (task.label)", "Did you mean 'label'", task={"label": "lable"}
    ),
    settings("no id column", "key", "data.id_column", data={"id_column": "key"}),
    settings("text is the label", "both text and label", task={"text": "label", "label": "label"}),
    # A guess between two columns is right half the time and never seen.
    settings("no known text", "Set task.text; the columns are 'first', 'label'", content=table(first=TEXTS, label=AB)),
    settings("two texts", "may be text or review; set task.text", content=table(text=TEXTS, review=TEXTS, label=AB)),
    settings("no known label", "Set task.label; the columns are", content=table(text=TEXTS, outcome=AB)),
    settings("names too many", "3 names", task={"label_names": ["a", "b", "c"], "kind": "regression"}),
    # Ids or prices taken for classes give a classifier of thousands of labels; one "n/a" must not make one either.
    settings(
        "integers",
        "40 different integers",
        "set task.kind to single-label or regression",
        content=table(text=FORTY, label=range(40)),
    ),
    settings("whole decimals", "whole numbers as decimals", content=table(text=FORTY, label=[1.0, 2.0] * 20)),
    settings("many names", "40 texts in 40 rows", content=table(text=FORTY, label=FORTY)),
    settings(
        "a word among numbers",
        "row 17",
        "'n/a', other rows have numbers",
        content=table(text=TEXTS, label=[*(f"{row}.5" for row in range(16)), "n/a", "1.5", "2.5", "3.5"]),
    ),
    # One NaN among the targets makes every weight NaN.
    file("numbers wanted", "csv", csv(), "row 1", "'a'", task=NUMBERS),
    *(
        file(
            f"{value!r}, other rows have numbers",
            "csv",
            table(text=TEXTS, label=[0.5, 1.5] * 8 + [value] + [2.0, 3.0, 4.0]),
            "row 17: ",
            expected,
            task=NUMBERS,
        )
        for expected, values in (
            ("finite", ("nan", "inf", "1e60", "1e999")),
            ("number", ("much",)),
            ("no label", ("", "  ")),
        )
        for value in values
    ),
    # A 2 in a 0/1 column gives a loss below zero.
    file(
        "flags of 2",
        "csv",
        table(text=TEXTS, x=[0, 1] * 10, y=[0, 1] * 9 + [2, 0]),
        "row 19: 'y' is '2', but a multi-label column holds only 0 and 1",
        task=FLAGS,
    ),
    file(
        "a flag left out",
        "csv",
        table(text=TEXTS, x=[0, 1] * 10, y=[0, 1] * 9 + ["", 0]),
        "row 19: no label in column 'y'",
        task=FLAGS,
    ),
    settings(
        "flags without any",
        "no training row has any label",
        content=table(text=TEXTS, x=[0] * 20, y=[0] * 20),
        task=FLAGS,
    ),
    settings("flags of other names", "need the same names", content=BOTH, task=FLAGS | {"label_names": ["x", "z"]}),
    settings("several labels of one kind", "name one", content=BOTH, task=FLAGS | {"kind": "single-label"}),
    settings("names that are no lists", "expected a list of label names", task={"kind": "multi-label"}),
    # One row cannot be divided into training and validation.
    settings(
        "a row a class", "every label has a single training row", content=table(text=TEXTS[:3], label=["a", "b", "c"])
    ),
    # A broken line that is skipped shifts every id after it.
    json_line("broken JSON", '{"text": ', "line 21: not JSON"),
    json_line("a list as a line", [1, 2], "line 21: expected a JSON object", "list"),
    json_line("null text", {"text": None}, "row 21", "text"),
    json_line("a number as text", {"text": 3}, "row 21: 'text' is int"),
    json_line("a huge number", '{"id": 1' + "0" * 5000 + "}", "line 21"),
    json_line("nested too deep", "[" * 100_000, "line 21", "nested"),
    json_line("half a character", '{"id": "x", "text": "\\ud800", "label": "a"}', "row 21"),
    file("an array cut off", "json", '[{"text": "a"}', "not JSON"),
    file("an array of numbers", "json", b"[1]", "row 1"),
    file("a number in an array", "jsonl", '[{"text": "a"}, 3]', "row 2: expected a JSON object"),
    file("Parquet of nothing", "parquet", b"PAR1", "Parquet"),
    file("Parquet damaged", "parquet", parquet()[:40] + bytes(60) + parquet()[100:]),
    file("Parquet whose column name is not UTF-8", "parquet", parquet().replace(b"label", b"l\xffbel"), "UTF-8"),
    file(
        "Parquet with a text that is not UTF-8",
        "parquet",
        parquet(text=as_text(*[b"a film", b"a fil\xff", b"films", b"film"] * 5)),
        "UTF-8",
    ),
    file("Parquet with a label that is not UTF-8", "parquet", parquet(label=as_text(*[b"a", b"b\xff"] * 10)), "UTF-8"),
    file("Parquet of numbers", "parquet", parquet(text=list(range(20))), "text"),
    file("Parquet with nulls", "parquet", parquet(text=["a", None, "b", "c"] * 5), "row 2", "text"),
    file("a spreadsheet", "xlsx", b"PK\x03\x04", "unknown kind of file", ".csv, .tsv, .jsonl, .json, .parquet"),
    file("words and tags as TSV", "tsv", "Ada\tB-PER\nmet\tO\n", "needs the extension .conll"),
    DataCase("without an ending", "train", csv(), ("unknown kind of file",), {}),
    file("CSV called Parquet", "parquet", csv(), "no readable Parquet"),
    # `tests/data/test_tags.py` has the other files of words and spans.
    DataCase("no entities", "train.conll", WORDS.replace("B-PER", "O").encode(), ("holds no entity",), {}),
    file(
        "spans that overlap",
        "jsonl",
        b'{"text": "Ann ran", "spans": [{"start": 0, "end": 3, "label": "A"}, {"start": 1, "end": 7, "label": "B"}]}',
        "row 1",
        "overlap",
    ),
    settings(
        "no words", "which columns hold words and tags", content=table(phrase=TEXTS, sort=AB), task={"kind": "tokens"}
    ),
    settings("one number", "cannot be split", content=b"text,label\nt,0.5\n"),
    settings("no such test file", "tset.csv", "data.test", data={"test": "/nowhere/tset.csv"}),
    settings("a folder", "folder", data={"test": "/tmp"}),
    settings("too few rows used", "one class only", "max_train_examples", data={"max_train_examples": 1}),
]
