"""Every format as other tools read it, what is wrong with a file, by row, and rows that lie on disk."""

import errno
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loading import TEXTS, WORDS, load
from loading import refused as load_refused

from experiments import write_lines
from kdlora.data.batches import tokenise
from kdlora.data.read import open_file
from kdlora.data.spool import doubles, read_column, settle, slice_rows, spool
from kdlora.distil.logits import TeacherLogits
from kdlora.errors import DataError

# Carriage returns inside quotes are normalised differently by every CSV reader; surrogates are not UTF-8.
texts = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\r\x00"), max_size=30)
rows_of_texts = st.lists(st.tuples(texts, texts), min_size=1, max_size=20)
quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path) -> dict[str, list]:
    source = open_file(path, "data.train")
    return source.read(source.columns).table.to_pydict()


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@quick
@given(rows=rows_of_texts)
def test_every_character_is_kept_as_pandas_reads_it(tmp_path: Path, rows) -> None:
    """Quotes and delimiters in texts shift columns or merge rows; Unicode's line separators must not end a line."""
    path = tmp_path / "data.csv"
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False, lineterminator="\n")
    assert read(path) == pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8").to_dict("list")
    objects = [{"text": a, "label": b} for a, b in rows]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in objects)
    expected = pd.read_json(io.StringIO(lines), lines=True, dtype=False).to_dict("list")
    assert read(write(tmp_path / "data.jsonl", lines)) == expected
    assert read(write(tmp_path / "data.json", json.dumps(objects))) == expected

    # A quote in a TSV text is a character; a CSV reader silently joins rows at it.
    rows = [tuple("x" + text.translate({9: " ", 10: " "}) for text in row) for row in rows]
    path = write(tmp_path / "data.tsv", "".join("\t".join(row) + "\n" for row in [("text", "label"), *rows]))
    assert list(zip(*read(path).values(), strict=True)) == rows


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_byte_order_mark_and_line_breaks(tmp_path: Path, line_break: str) -> None:
    """Excel's byte-order mark makes the first column unfindable; its line breaks end up in labels."""
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("b.csv", ";"), ("c.csv", "\t"), ("d.csv", "|")):
        rows = [["text", "label"], ["ä b", "1"], ["c", "0"]]
        path = write(tmp_path / name, "\ufeff" + "".join(delimiter.join(row) + line_break for row in rows))
        assert read(path) == {"text": ["ä b", "c"], "label": ["1", "0"]}
    lines = ["sep=;", "text, raw;label;count", "a, b, c;1;2", '"d;e";0;3', ""]
    for begin in (0, 1):  # a comma in a name is not what divides the columns
        found = read(write(tmp_path / "a.csv", "\ufeff" + line_break.join(lines[begin:])))
        assert found == {"text, raw": ["a, b, c", "d;e"], "label": ["1", "0"], "count": ["2", "3"]}
    path = write(tmp_path / "a.jsonl", "\ufeff" + '{"text": "ä"}' + line_break + line_break + '{"text": "b"}')
    assert read(path) == {"text": ["ä", "b"]}


def test_odd_files_and_words(tmp_path):
    """The usual fault; the nearest name in the folder is the remedy."""
    write(tmp_path / "reviews.csv", "text,label\na,b\n")
    message = refused(tmp_path / "review.csv")
    assert all(part in message for part in ("does not exist", "Did you mean 'reviews.csv'", "data.train"))
    assert "is a folder" in refused(tmp_path)

    # Parquet's own reader takes both.
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), tmp_path / "a.parquet")
    assert "two columns named" in refused(tmp_path / "a.parquet")

    # Kaggle's SMS spam, from a spreadsheet, has three columns without a name.
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 4, names=["v1", "v2", "", ""]), tmp_path / "a.parquet")
    for path in (write(tmp_path / "b.csv", "v1,v2,,\na,a,,\n"), tmp_path / "a.parquet"):
        assert open_file(path, "data.train").read(("v1", "v2")).table.to_pydict() == {"v1": ["a"], "v2": ["a"]}

    # Pandas reads the label NA (Namibia, "not applicable") as missing.
    path = write(tmp_path / "a.csv", "text,label\nnull,NA\nNone,nan\n")
    assert read(path) == {"text": ["null", "None"], "label": ["NA", "nan"]}

    # What pandas writes where nothing else is asked for filled the screen with the type of every row.
    for orient in ("columns", "index"):
        pd.DataFrame({"text": TEXTS, "label": WORDS}).to_json(tmp_path / "a.json", orient=orient)
        assert "df.to_json(FILE, orient='records', lines=True)" in refused(tmp_path / "a.json")
    for column in ("text", "label"):
        rows = [{"id": "1", "text": "a", "label": "b", column: {f"key{number}": 1 for number in range(500)}}]
        path = write_lines(tmp_path / "a.jsonl", rows)
        assert len(load_refused(train=path)) < len(str(path)) + 200


def test_long_files_and_quotes_that_are_text(tmp_path):
    """A fault is to be found beyond the first block, too."""
    content = b"tx,label\n" + ("é" * 50 + ",1\n").encode() * 30_000 + b"\xff,0\n"
    assert "line 30002: byte 0xFF is not UTF-8" in refused(write(tmp_path / "a.csv", content))

    # Scores that begin with whole numbers, thousands of rows long, must not be cut or refused; names among them must.
    lines = ['{"text": "a", "label": 1}'] * 10_000
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "b", "label": 2.5}']))
    table = open_file(path, "data.train").read(("text", "label")).table
    assert table["label"].type == pa.float64()
    assert (table["label"][0].as_py(), table["label"][10_000].as_py()) == (1.0, 2.5)
    message = refused(write(path, "\n".join([*lines, '{"text": "b", "label": "bad"}'])))
    assert "make the whole column one type" in message

    # Refusing every quote would refuse half of GLUE; a text may end with a line break and its closing quote.
    content = 'text\tlabel\n" the witness "\t1\nhe said ""no""\t0\n"\t1\n'
    assert read(write(tmp_path / "a.tsv", content))["text"] == ['" the witness "', 'he said ""no""', '"']
    assert read(write(tmp_path / "b.csv", 'label,text\n1,a\n0,"b\nc"\n'))["text"] == ["a", "b\nc"]


def test_rows_between_two_stray_quotes_are_not_lost_unseen(tmp_path, caplog):
    """Of 100 rows 50 were the text of one, without a word."""
    rows = [f"{number},a text" for number in range(100)]
    rows[10], rows[60] = '10,"a text', '60,a text"'
    path = write(tmp_path / "a.csv", "\n".join(["label,text", *rows]))
    assert len(read(path)["text"]) == 50
    assert f"{path}: lines 12 to 62 are one row by their quotes, though each looks like a row" in caplog.text
    caplog.clear()
    letter = 'label,text\n1,"Dear all,\n' + "we met, and spoke\n" * 20 + 'and, then, left"\n'
    assert len(read(write(path, letter.replace("and spoke\n", "and, too, spoke\n", 1)))["text"]) == 1
    assert not caplog.text


@pytest.mark.parametrize(
    "content",
    [
        '"text"\t"label"\n"a"\t"1"\n"b"\t"0"\n',
        'text\tlabel\n"he said ""no"""\t1\nb\t0\n',
        'text\tlabel\n"a"\t1\n"b"\t0\n',
        'text\tlabel\n"a\tb"\t1\n',
        'text\tlabel\n"a\nb"\t1\n',
    ],
)
def test_quoted_tsv(tmp_path: Path, content: str) -> None:
    """A TSV file with CSV quoting would be learnt with its quotes, and served without."""
    message = refused(write(tmp_path / "a.tsv", content))
    assert "without quoting" in message
    assert ".csv" in message
    assert read(write(tmp_path / "a.csv", content))["text"][0].strip('"') != ""


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"text": ["a", "b"], "label": ["x", "y"]}', "it is one object of columns"),
        ('{"text": {"0": "a"}, "label": {"0": "x"}}', "it is one object of columns"),
        ('{\n  "data": [{"text": "a", "label": "x"}]\n}\n', "line 1: an object over several lines"),
        ('{\n "text": "a",\n "label": "x"\n}\n{\n "text": "b",\n "label": "x"\n}\n', "an object over several lines"),
    ],
)
def test_json_of_another_shape(tmp_path: Path, content: str, told: str) -> None:
    """It was called no JSON, or a sentence whose tags are of no scheme."""
    message = refused(write(tmp_path / "a.json", content))
    assert told in message
    assert "write an object a line: df.to_json(FILE, orient='records', lines=True)" in message


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """It was said to be empty, whatever it held."""
    os.mkfifo(tmp_path / "a.csv")
    assert "is a pipe or a device, which cannot be read twice" in refused(tmp_path / "a.csv")


def test_second_files_need_the_labels_of_training(csv_file):
    """A split without labels can't be scored."""
    path, bare = csv_file("a.csv", text=TEXTS, label=WORDS), csv_file("b.csv", text=TEXTS)
    other = csv_file("c.csv", text=["t", "u"], label=["good", "god"])
    for split in ("validation", "test"):
        message = load_refused(train=path, **{split: bare})
        assert bare in message
        assert "need labels" in message
        # A label that was never learnt costs accuracy that no training can win back.
        message = load_refused(train=path, **{split: other})
        assert f"{other}, row 2: the label 'god'" in message
        assert "Did you mean 'good'" in message
    named = {"label_names": ["bad", "good", "god"]}
    assert "validation split has labels that training lacks: 'god'" in load_refused(named, train=path, validation=other)
    many = csv_file("d.csv", text=list(map(str, range(40))), label=[f"class {number}" for number in range(40)])
    named = {"label_names": ["bad", "good", *(f"class {number}" for number in range(40))]}
    assert "'class 9' and 30 more. Add" in load_refused(named, train=path, validation=many)


@pytest.mark.parametrize(
    ("rows", "task", "expected"),
    [
        ([("t", 0), ("t", 1)] * 5 + [("u", None), ("v", None)], {}, "row 11: no label in column 'label' (2"),
        ([("t", [0, 1]), ("t", [0, 3])], {}, "row 2: 'label' is 3, but"),
        ([("t", [0, 1]), ("t", [0])], {}, "differ in length"),
        ([("t", ["a"]), ("t", ["b", " "])], {}, "row 2: the label ' ' ('label') is not among"),
        ([("t", ["a"]), ("t", ["b", "c"])], {"label_names": ["a", "b"]}, "row 2: the label 'c'"),
        ([("t", []), ("t", [])], {}, "is empty in every row"),
        ([(None, "a"), (None, "b")], {}, "row 1: the text 'text' is empty (1 more such rows)"),
        ([("t", [0, 1])], {"label_names": ["a", "b", "c"]}, "row 1: 'label' has 2 values, but there are 3 labels"),
    ],
)
def test_values_that_only_json_has(tmp_path: Path, rows, task, expected) -> None:
    """A missing label must not become a class of its own, or zero; numbers as texts come from a wrong column."""
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "label": label} for text, label in rows])
    assert expected in load_refused(task, train=path)


def test_ids_that_are_lists_and_decimals_as_classes(tmp_path):
    """An id has to be written into tables of logits and predictions."""
    rows = [{"id": [1], "text": "t", "label": "a"}, {"id": [2], "text": "u", "label": "b"}]
    assert "the id column 'id' holds list" in load_refused(train=write_lines(tmp_path / "a.jsonl", rows))
    pd.DataFrame({"id": np.arange(20.0), "text": TEXTS, "label": ["a", "b"] * 10}).to_parquet(tmp_path / "b.parquet")
    assert "holds double; expected text or integers" in load_refused(train=tmp_path / "b.parquet")

    # A pandas column with 1.0 and 0.0 means the classes 1 and 0; 0.5 means no class.
    path, task = tmp_path / "a.parquet", {"kind": "single-label"}
    for kind in (np.float64, np.float16):
        pd.DataFrame({"text": TEXTS, "label": np.array([0.0, 1.0] * 10, kind)}).to_parquet(path)
        assert load(task, train=path).task.label_names == ("0", "1")
    for value in (0.5, 1e20):
        pd.DataFrame({"text": TEXTS, "label": [0.0, value] * 10}).to_parquet(path)
        assert f"row 2: the label 'label' is {value}, a decimal" in load_refused(task, train=path)
    for missing in (None, float("nan")):
        pq.write_table(pa.table({"text": TEXTS, "label": pa.array([0.0, missing, 1.0, 0.0] * 5, pa.float64())}), path)
        for found in (load_refused(train=path), load_refused(task, train=path)):
            assert "row 2: no label in column 'label' (5 of 20 rows)" in found


ROWS = 4_000


def write_parquet(path: Path, rows: int) -> Path:
    texts = [f"a good film that nobody should have to see twice {row}" for row in range(rows)]
    pq.write_table(pa.table({"text": texts, "label": ["no", "yes"] * (rows // 2)}), path)
    return path


@pytest.mark.parametrize("most_bytes", [1 << 30, 0])
@pytest.mark.parametrize("selection", [range(0, 200, 3), [*range(150, 200), *range(150)][::-7], [7, 7, 199, 0], []])
def test_slices_are_the_rows_in_order(selection, most_bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A selection that is read past its list of row numbers gives texts the labels of others, written down or not."""
    monkeypatch.setattr("kdlora.data.spool._MOST_BYTES", most_bytes)  # more texts than pyarrow joins
    chosen = Dataset.from_dict({"value": list(range(200)), "id": list(map(str, range(200)))}).select(selection)
    parts = list(slice_rows(chosen, ["id"], 3))
    assert [name for part in parts for name in part["id"].to_pylist()] == list(map(str, selection))
    assert all(0 < part.num_rows <= 3 for part in parts)
    assert settle(chosen)[:] == chosen[:]
    assert read_column(chosen, "id").to_pylist() == list(map(str, selection))


@pytest.mark.parametrize("validation", [True, False])
def test_prepared_rows_lie_on_disk(tmp_path: Path, tiny_tokenizer, validation: bool) -> None:
    """Ten million rows in memory, as ids, labels, logits and tokens, are more than most machines have."""
    files = {"train": write_parquet(tmp_path / "train.parquet", ROWS)}
    if validation:
        files["validation"] = write_parquet(tmp_path / "validation.parquet", 10)
    ids = [str(row) for row in range(ROWS)]
    logits = TeacherLogits(ids, np.ones((ROWS, 2), np.float32), ("no", "yes"), "made up")
    before = pa.total_allocated_bytes()
    splits = load(**files)
    tokens = tokenise(logits.attach(splits.train), tiny_tokenizer, 32)
    assert len(tokens.dataset) >= 0.8 * ROWS
    # Where validation rows are drawn, the numbers of the rows remain, 8 bytes each, and room to grow.
    assert pa.total_allocated_bytes() - before < (4 if validation else 24) * ROWS


def test_no_file_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A named file stays when the process is killed while it writes: a night of kills would fill the disk."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def batches():
        for value in range(3):
            yield pa.RecordBatch.from_pydict({"value": [value]})
            seen.append(list(tmp_path.iterdir()))

    table = spool(batches(), "three rows")
    assert seen == [[], [], []]
    assert list(tmp_path.iterdir()) == []
    assert table["value"].to_pylist() == [0, 1, 2]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_not_the_datas_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound file was called unreadable, with the advice to write it again, where only space was wanting."""
    source = open_file(write_parquet(tmp_path / "train.parquet", 10), "data.train")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "w+b"))  # noqa: SIM115, PTH123
    with pytest.raises(OSError, match="No space left on device in the folder for temporary") as caught:
        source.read(("text", "label"))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))


names = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(ids=st.lists(st.one_of(names, st.sampled_from(["", "a", "a\0", "\0a", "12345678", "123456789"])), max_size=30))
def test_what_a_set_says(ids: list[str]) -> None:
    """Doubles that are missed teach one row twice and another never; false ones refuse good data."""
    assert sorted(doubles(pa.array(ids, pa.string())).to_pylist()) == sorted({one for one in ids if ids.count(one) > 1})
