"""Files and streams: order, bad rows, bounded windows, and runs that are interrupted."""

import contextlib
import csv
import errno
import gzip
import io
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deploy_folders import PAIRS, TEXTS
from experiments import edit_json
from kdlora.deploy.predict import Classifier
from kdlora.deploy.rows import Columns, RowReader
from kdlora.deploy.stream import csv_bytes, predict_file
from kdlora.errors import ArtifactError, ConfigError, DataError
from tiny import write_csv


@pytest.fixture(scope="module")
def model(exported):
    return Classifier.load(exported(), precision="fp32")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    monkeypatch.setattr("kdlora.deploy.rows._WINDOW_ROWS", 10)


def _read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _interrupt(model: Classifier, source: Path, to: Path, after: int, **settings: Any) -> None:
    def stop(rows: int, fraction: float | None) -> None:
        if rows >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_file(model, source, to, progress=stop, **settings)


@pytest.fixture
def source(tmp_path) -> Path:
    return write_csv(tmp_path / "in.csv", [{"id": f"r{n}", "text": text} for n, text in enumerate(TEXTS)])


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".txt"])
def test_input_order_and_ids(tmp_path, model, suffix):
    """Prevents labels that belong to another row, in any format, when windows are sorted by length."""
    path = tmp_path / f"in{suffix}"
    frame = pd.DataFrame({"id": [f"r{n}" for n in range(len(TEXTS))], "text": TEXTS})
    {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        ".parquet": lambda: frame.to_parquet(path),
        ".txt": lambda: path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8"),
    }[suffix]()
    summary = predict_file(model, path, tmp_path / "out.jsonl")
    rows = _read(tmp_path / "out.jsonl")
    assert (summary.rows, summary.errors, summary.resumed) == (len(TEXTS), 0, 0)
    assert [row["id"] for row in rows] == [f"{'' if suffix == '.txt' else 'r'}{n}" for n in range(len(TEXTS))]
    expected = model.predict(TEXTS)
    assert [row["label"] for row in rows] == [p.label for p in expected]
    for row, prediction in zip(rows, expected, strict=True):
        assert row["probabilities"] == pytest.approx(prediction.probabilities, abs=1e-4)
    assert not (tmp_path / "out.jsonl.partial").exists()


@pytest.mark.parametrize("kind", ["single-label", "regression", "multi-label"])
def test_outputs_agree(tmp_path, exported, source, kind):
    """Prevents a format that drops a column or rounds what another writes, and a schema that only one kind fits."""
    model = Classifier.load(exported("bert", kind), precision="fp32")
    for suffix in ("jsonl", "csv", "parquet"):
        predict_file(model, source, tmp_path / f"out.{suffix}")
    rows, parquet = _read(tmp_path / "out.jsonl"), pq.read_table(tmp_path / "out.parquet")
    table = pd.read_csv(tmp_path / "out.csv", keep_default_na=False)
    shares = [] if kind == "regression" else [f"probability:{name}" for name in model.label_names]
    assert list(table.columns) == parquet.column_names == ["id", "label", *shares, "error"]
    said = [list(one.label) if kind == "multi-label" else one.label for one in model.predict(TEXTS)]
    said = pytest.approx(said, abs=1e-4) if kind == "regression" else said
    assert said == [row["label"] for row in rows] == parquet["label"].to_pylist()
    assert table["label"].tolist() == (["|".join(one) for one in said] if kind == "multi-label" else said)
    for column in shares:
        given = pytest.approx([row["probabilities"][column.partition(":")[2]] for row in rows])
        assert given == table[column].tolist()
        assert given == parquet[column].to_pylist()
    types = {"regression": pa.float64(), "multi-label": pa.list_(pa.string())}
    assert parquet.schema.field("label").type == types.get(kind, pa.string())


def test_labels_that_csv_cannot_divide_are_refused_there(tmp_path, exported, source):
    """`a|b|c` said neither whether it is two labels or three, nor that it might be either."""
    model = Classifier.load(exported("bert", "multi-label"))
    model.folder = replace(model.folder, label_names=("a|b", *model.label_names[1:]))
    with pytest.raises(DataError, match=r"out.csv: in CSV \| stands between labels.*\.jsonl"):
        predict_file(model, source, tmp_path / "out.csv")
    assert predict_file(model, source, tmp_path / "out.jsonl")


def test_a_regression_of_several_values_fits_all_formats(tmp_path, classifier_folder, source):
    """Such a model of other hands ended Parquet in a traceback, after the file was read."""
    folder = shutil.copytree(classifier_folder("bert", "multi-label"), tmp_path / "model")
    edit_json(folder / "config.json", problem_type="regression")
    for suffix in ("jsonl", "parquet"):
        predict_file(Classifier.load(folder), source, tmp_path / f"out.{suffix}")
    said = [row["label"] for row in _read(tmp_path / "out.jsonl")]
    assert said == pq.read_table(tmp_path / "out.parquet")["label"].to_pylist()
    assert all(len([float(value) for value in row]) > 1 for row in said)


def test_each_thread_computes_a_batch(tmp_path, exported, source, monkeypatch):
    """In one batch for all threads they wait for each other: a file took half as long again."""
    run, gate = Classifier.run, threading.Barrier(2, timeout=30)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(Classifier, "run", lambda self, inputs: gate.wait() >= 0 and run(self, inputs))
    assert predict_file(exported() / "model.onnx", source, tmp_path / "out.jsonl", batch_size=5).rows == 60
    monkeypatch.undo()
    expected = Classifier.load(exported(), precision="fp32").predict(TEXTS)
    assert [row["label"] for row in _read(tmp_path / "out.jsonl")] == [one.label for one in expected]


def test_pairs(tmp_path, model):
    """Prevents a second column that is not read."""
    path = write_csv(tmp_path / "in.csv", [{"premise": a, "hypothesis": b, "idx": n} for n, (a, b) in enumerate(PAIRS)])
    predict_file(model, path, tmp_path / "out.jsonl", text=("premise", "hypothesis"), id_column="idx")
    rows = _read(tmp_path / "out.jsonl")
    assert [row["label"] for row in rows] == [p.label for p in model.predict(PAIRS)]
    assert [row["id"] for row in rows] == [str(n) for n in range(len(PAIRS))]


def test_bad_rows_are_entries(tmp_path, model, monkeypatch):
    """Prevents one bad row from stopping a million good ones, or an output that looks whole where it is to stop."""
    path = tmp_path / "in.jsonl"
    lines = [
        b'{"id": 1, "text": "wonderful"}',
        b'{"id": 2, "text": ""}',
        b"{broken",
        b'{"id": 4}',
        b"[1]",
        b'{"id": 6, "text": 7}',
    ]
    path.write_bytes(b"\n".join([*lines, b'{"id": 7, "text": "caf\xff"}', b'{"id": 8, "text": "boring"}']) + b"\n")
    summary = predict_file(model, path, tmp_path / "out.jsonl")
    rows = _read(tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["1", "2", "", "4", "", "6", "7", "8"]
    assert ["error" in row for row in rows] == [False, True, True, True, True, True, True, False]
    assert (summary.rows, summary.errors) == (8, 6)
    for row, word in zip(
        rows[1:-1], ("empty", "not JSON", "missing", "JSON object", "expected a text", "save it as UTF-8"), strict=True
    ):
        assert word in row["error"]
        assert "label" not in row
    monkeypatch.setattr("kdlora.deploy.rows._WINDOW_ROWS", 1)
    with pytest.raises(DataError, match=r"in.jsonl: row 2: the text is empty"):
        predict_file(model, path, tmp_path / "strict.jsonl", strict=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_bad_rows_of_tables_are_entries(tmp_path, model):
    """Prevents ragged rows from shifting columns, errors lost in CSV and Parquet, a traceback for bytes in Parquet."""
    texts = pa.array([b"wonderful", b"caf\xff", b"boring"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    predict_file(model, tmp_path / "in.parquet", tmp_path / "out.jsonl")
    assert ["utf-8" in row.get("error", "") for row in _read(tmp_path / "out.jsonl")] == [False, True, False]
    path = tmp_path / "in.csv"
    path.write_text('id,text\na,"two\nlines, one value"\nb\nc,one,two\n\nd,good\ne,"open\n', encoding="utf-8")
    for suffix in ("csv", "parquet"):
        predict_file(model, path, tmp_path / f"out.{suffix}")
    table = pd.read_csv(tmp_path / "out.csv")
    assert table["label"].notna().tolist() == [True, False, False, True, False]
    assert "row 2: 1 columns where 2 are expected" in table["error"][1]
    assert "row 5: not readable as CSV: unexpected end of data" in table["error"][4]
    # A bad row has no id that is another's, as its number might be.
    assert table["id"].fillna("").tolist() == ["a", "", "", "d", ""]
    assert pq.read_table(tmp_path / "out.parquet")["error"].null_count == 2


def test_rows_behind_an_open_quote_are_not_lost_unseen(tmp_path, model):
    """Of 9,000 rows 8,949 were the value of one bad row, and the command ended well."""
    path = tmp_path / "in.csv"
    path.write_text('id,text\na,good\nb,"open\nc,bad\nd,good\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"in\.csv, line 3: not readable as CSV: unexpected end of data, in line 5"):
        predict_file(model, path, tmp_path / "out.csv")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("in.txt", "\ufefftext\nwonderful\nawful\n".encode("utf-16-le"), "it is UTF-16; save it as UTF-8"),
        ("in.csv", "\ufefftext\nwonderful\nawful\n".encode("utf-16-be"), "it is UTF-16; save it as UTF-8"),
        ("in.txt", gzip.compress(b"text\nwonderful\n", mtime=0), "it is compressed \\(gzip\\); unpack it first"),
    ],
)
def test_other_bytes_are_refused(tmp_path, model, name, content, told):
    """Lines of it pass for UTF-8 with zeros in it, or for bad rows, and would get labels, or an answer that is none."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {told}"):
        predict_file(model, tmp_path / name, tmp_path / "out.jsonl")
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


def test_a_closed_output_is_named(tmp_path, model, source, monkeypatch):
    """`>&-` ended in a traceback."""
    monkeypatch.setattr("sys.stdout", None)
    with pytest.raises(DataError, match="standard output is closed; name a file"):
        predict_file(model, source, "-")


def test_rows_without_an_id_beside_others_have_none(tmp_path, model):
    """The number of a row was the id of another, whose label whoever joined the two by id overwrote."""
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1, "text": "good"}\n{"text": "bad"}\n{"id": 2}\nno\n', encoding="utf-8")
    predict_file(model, path, tmp_path / "out.jsonl")
    found = _read(tmp_path / "out.jsonl")
    assert [row["id"] for row in found] == ["1", "", "2", ""]
    assert ["error" in row for row in found] == [False, False, True, True]


@pytest.mark.parametrize("columns", [{"text": "text"}, {"id_column": "key"}])
def test_lines_of_text_have_no_columns_unless_a_format_says_so(tmp_path, model, columns, monkeypatch):
    """Lines of CSV were classified as they stand, the header with them, though the command named a column."""
    (tmp_path / "table.txt").write_text("key\ttext\na\twonderful\n")
    for source in ("-", tmp_path / "table.txt"):
        with pytest.raises(DataError, match="one text a line, which has no columns; name its format"):
            predict_file(model, source, tmp_path / "out.csv", **columns)
    assert predict_file(model, source, tmp_path / "out.csv", input_format="tsv", **columns).rows == 1
    monkeypatch.setattr("sys.stdin", None)  # as after <&-
    with pytest.raises(DataError, match="standard input is closed"):
        predict_file(model, "-", tmp_path / "out.csv")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_interrupted_run_resumes(tmp_path, model, source, suffix, monkeypatch):
    """Prevents doubled or lost rows after a kill, and an output file before the run is whole."""
    predict_file(model, source, tmp_path / f"whole{suffix}")
    out = tmp_path / f"out{suffix}"
    _interrupt(model, source, out, 30)
    assert not out.exists()
    with monkeypatch.context() as patch:
        predict, asked = Classifier.predict, []
        patch.setattr(Classifier, "predict", lambda self, texts, **_: asked.extend(texts) or predict(self, texts))
        summary = predict_file(model, source, out)
    assert (summary.rows, summary.resumed, asked) == (60, 30, TEXTS[30:])
    assert out.read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()


def test_parts_of_another_batch_size_are_not_gone_on_with(tmp_path, model, source):
    """An int8 score depends on its batch: the file was half of one size, half of another."""
    out = tmp_path / "out.csv"
    _interrupt(model, source, out, 30, batch_size=4)
    with pytest.raises(ArtifactError, match=r"batch_size was 4, is 8\). Give the same again"):
        predict_file(model, source, out, batch_size=8)
    assert predict_file(model, source, out, batch_size=4).resumed == 30


def test_a_second_process_and_a_half_removed_folder_spoil_nothing(tmp_path, model, source):
    """Two commands wrote their parts among each other; a kill at the very end made the next call write half a file."""
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    predict_file(model, source, whole)

    def again(rows, fraction):
        for resume in (True, False):
            with pytest.raises(ArtifactError, match=r"another process writes predictions into .*out\.jsonl"):
                predict_file(model, source, out, resume=resume)

    assert predict_file(model, source, out, progress=again).rows == 60
    assert out.read_bytes() == whole.read_bytes()
    _interrupt(model, source, out, 30)
    next((tmp_path / "out.jsonl.partial").glob("part-00000000-*")).unlink()
    assert predict_file(model, source, out).resumed == 0
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "out.jsonl.partial").exists()


def test_a_disk_without_locks_and_a_file_as_folder(tmp_path, model, source, monkeypatch):
    """Predictions that were written everywhere ended with a traceback where a file system knows no locks."""

    def refuse(*_, **__):
        raise OSError(errno.ENOLCK, "no locks here")

    with monkeypatch.context() as patch:
        patch.setattr("kdlora.system.storage.FileLock.acquire", refuse)
        assert predict_file(model, source, tmp_path / "out.jsonl").rows == 60
    with pytest.raises(ArtifactError, match=r"in\.csv is no folder; name one"):
        predict_file(model, source, source / "out.jsonl")
    with pytest.raises(OSError, match=r"name too long|WinError"):  # with what is added while it is written
        predict_file(model, source, tmp_path / f"{'a' * 230}.jsonl")
    assert not list(tmp_path.glob("a*")), "refused before a row is predicted"
    (tmp_path / "new.jsonl.partial").mkdir()
    assert predict_file(model, source, tmp_path / "new.jsonl").rows == 60, "what a full disk left"


def test_columns_are_those_of_the_first_row_wherever_it_goes_on(tmp_path, model):
    """The row at which a killed run goes on had no text: all that was done before was deleted."""
    rows = [{"id": str(number), "review": text} for number, text in enumerate(TEXTS)]
    del rows[30]["review"]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    predict_file(model, source, tmp_path / "whole.jsonl", text="review")
    out = tmp_path / "out.jsonl"
    _interrupt(model, source, out, 30, text="review")
    summary = predict_file(model, source, out, text="review")
    assert (summary.resumed, summary.errors) == (30, 1)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_the_text_is_in_no_other_column_without_a_word(tmp_path, model, caplog):
    """A null left out in the first row had the subjects of all mails read; a file without header lost a row."""
    (tmp_path / "in.jsonl").write_text('{"subject": "Re: order"}\n{"subject": "Hi", "text": "wonderful"}\n')
    for text in (None, "text"):
        summary = predict_file(model, tmp_path / "in.jsonl", tmp_path / "out.jsonl", text=text)
        assert (summary.rows, summary.errors) == (2, 1)
        assert _read(tmp_path / "out.jsonl")[1]["label"] == model.predict(["wonderful"])[0].label
    assert not caplog.records
    (tmp_path / "in.csv").write_text("a superb plot\nan awful ending\n")
    assert predict_file(model, tmp_path / "in.csv", tmp_path / "out.jsonl").rows == 1
    assert "in.csv: the texts are those of the column 'a superb plot', the only one left; --text" in caplog.text


def test_long_rows_are_not_held_to_look_for_columns(tmp_path):
    """A hundred texts of a million words each filled the memory before the first was predicted."""
    path = tmp_path / "in.jsonl"
    path.write_text(f"{json.dumps({'text': 'a' * 200_000})}\n" * 100)
    reader = RowReader(path, Columns(None, None, "id", cut=10))
    with contextlib.closing(iter(reader)) as rows:
        assert next(rows).text == "a" * 10
        assert 0.3 < reader.fraction() < 0.5


def test_a_carriage_return_in_a_cell_makes_no_other_row():
    """Python 3.11 leaves it bare where lines end otherwise, and one row is read back as two."""
    rows = [["1", "a\rb", "x"], ["2", 'c"d\ne', ""]]
    assert csv_bytes(rows) == b'1,"a\rb",x\n2,"c""d\ne",\n'
    assert list(csv.reader(io.StringIO(csv_bytes(rows).decode(), newline=""))) == rows


def test_names_that_are_not_utf_8(tmp_path, model, source):
    """A file of an old system is read like any other; the note of what was begun could not be written."""
    odd = tmp_path / os.fsdecode(b"caf\xe9.csv")
    odd.write_bytes(source.read_bytes())
    _interrupt(model, odd, tmp_path / "out.jsonl", 30)
    assert predict_file(model, odd, tmp_path / "out.jsonl").resumed == 30


def test_stale_parts_are_refused(tmp_path, exported, source):
    """Prevents one output of two inputs, or of a model before and after two of its labels were exchanged."""
    place, out = Path(shutil.copytree(exported(), tmp_path / "model")), tmp_path / "out.jsonl"
    model = Classifier.load(place, precision="fp32")
    _interrupt(model, source, out, 10)
    names = json.loads((place / "config.json").read_text())["id2label"]
    edit_json(place / "config.json", id2label=dict(zip(names, reversed(names.values()), strict=True)))
    refused = r"out.jsonl.partial: holds an interrupted prediction of something else"
    with pytest.raises(ArtifactError, match=refused):
        predict_file(Classifier.load(place, precision="fp32", verify=False), source, out)
    vocabulary = json.loads((place / "tokenizer.json").read_text())
    (place / "tokenizer.json").write_text(json.dumps(vocabulary, indent=1))
    edit_json(place / "config.json", id2label=names)
    with pytest.raises(ArtifactError, match=refused):
        predict_file(Classifier.load(place, precision="fp32", verify=False), source, out)
    write_csv(source, [{"id": "x", "text": "another file"}])
    with pytest.raises(ArtifactError, match=refused):
        predict_file(model, source, out)
    assert predict_file(model, source, out, resume=False).rows == 1
    assert [row["id"] for row in _read(out)] == ["x"]

    # Bad rows of the parts would be passed on by a call that is to stop at the first one.
    write_csv(source, [{"id": str(number), "text": "a text" if number else ""} for number in range(30)])
    _interrupt(model, source, out, 10)
    with pytest.raises(ArtifactError, match=r"strict was False, is True"):
        predict_file(model, source, out, strict=True)


def test_a_file_has_as_many_texts_as_the_model_reads(tmp_path, trained_on):
    """A whole file of labels for other questions than the model was trained to answer."""
    single, pairs = Classifier.load(trained_on("review")), Classifier.load(trained_on("premise", "hypothesis"))
    named = write_csv(tmp_path / "named.csv", [{"review": "wonderful", "remark": "x"}])
    assert predict_file(single, named, tmp_path / "named.jsonl").errors == 0  # the column of the training data
    path = write_csv(tmp_path / "in.csv", [{"text": a, "text_pair": b} for a, b in PAIRS])
    predict_file(single, path, tmp_path / "single.jsonl")
    assert [row["label"] for row in _read(tmp_path / "single.jsonl")] == [p.label for p in single.predict(TEXTS[:12])]
    with pytest.raises(DataError, match="trained on single texts, got the text 'text' and 'text_pair'"):
        predict_file(single, path, tmp_path / "no.jsonl", text=("text", "text_pair"))
    with pytest.raises(DataError, match="trained on pairs of texts, got the text 'text'"):
        predict_file(pairs, path, tmp_path / "no.jsonl", text="text")
    (tmp_path / "in.jsonl").write_text('{"text": "wonderful"}\n{"text": ["one", "another"]}\n')
    assert predict_file(single, tmp_path / "in.jsonl", tmp_path / "out.jsonl").errors == 1
    assert not (tmp_path / "no.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "content", "settings", "kind", "message"),
    [
        ("in.csv", "id,txt,b\n1,a,b\n", {}, DataError, "expected a column 'text'.*there are id, txt, b"),
        ("in.csv", "id,texts\n1,a\n", {"text": "text"}, DataError, "no column 'text'.*Did you mean 'texts'"),
        ("in.csv", "idd,text\n1,a\n", {"id_column": "nr"}, DataError, "no column 'nr'; there are idd, text"),
        ("in.csv", "", {}, DataError, "header line with the column names, got an empty file"),
        ("in.csv", "text\na\n", {"source": "nowhere.csv"}, DataError, "no such file"),
        ("in.csv", "text\na\n", {"source": "."}, DataError, "not a file, but a folder or a pipe"),
        ("in.xlsx", "x", {}, DataError, "cannot tell the format from '.xlsx'"),
        ("in.json", "[]", {}, DataError, "An array of JSON is not read row by row: write an object a line"),
        ("in.jsonl", '[{"text": "a"}]', {}, DataError, "in.jsonl: it holds an array of JSON.*write an object a line"),
        ("in.tsv", 'text\na\n"no ""b"" here"\n', {}, DataError, "in.tsv, row 2: a text is in CSV quotes.*without quot"),
        ("in.csv", "text\na\n", {"input_format": "cvs"}, DataError, "unknown input format 'cvs'.*Did you mean 'csv'"),
        ("in.csv", "text\na\n", {"text": ("a", "b", "c")}, ConfigError, "one text column or the two of a pair"),
        ("in.csv", "text\na\n", {"batch_size": 0}, ConfigError, "at least 1"),
        ("in.csv", "text,text\na,b\n", {}, DataError, "two columns 'text'"),
        ("in.csv", "text\na\n", {"to": "out.txt"}, DataError, "expected an output file of .csv"),
    ],
)
def test_bad_input_is_named(tmp_path, model, name, content, settings, kind, message):
    """Prevents a traceback for a typing mistake, and files left behind by it."""
    (tmp_path / name).write_text(content)
    source, to = settings.pop("source", name), settings.pop("to", "out.csv")
    with pytest.raises(kind, match=message):
        predict_file(model, tmp_path / source, tmp_path / to, **settings)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
