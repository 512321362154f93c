"""Teacher logits for collections: every row once, whatever happens on the way."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from experiments import read_rows, write_collection, write_lines
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import load_splits
from kdlora.data.logit_table import LOGIT, open_collection
from kdlora.data.tags import tag_names
from kdlora.data.tasks import Task
from kdlora.deploy.predict import Classifier
from kdlora.distil.teacher_table import read_collection
from kdlora.errors import ArtifactError, ConfigError, DataError, ModelError
from kdlora.evidence.records import ExperimentLayout
from kdlora.experiment import labelling
from kdlora.experiment.labelling import LabelSettings, label_collection
from kdlora.experiment.settle import check_table
from kdlora.experiment.stages import label_training_rows, train_run
from kdlora.models.encoders import load_encoder, save_encoder
from kdlora.system.storage import write_json_atomic
from sentences import tagged_rows, write_conll
from tiny import sentiment_rows, task, write_csv

TASK = task()


def rows(count: int, seed: int) -> list[dict[str, str]]:
    return [{"id": f"{seed}-{row['id']}", "text": row["text"]} for row in sentiment_rows(count, seed)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Ninety rows in three formats, one of them in small row groups."""
    folder = tmp_path_factory.mktemp("texts")
    pq.write_table(pa.Table.from_pylist(rows(40, 1)), folder / "a.parquet", row_group_size=7)
    write_lines(folder / "b.jsonl", rows(30, 2))
    write_csv(folder / "c.csv", rows(20, 3))
    return folder


def read_all(folder: Path) -> pd.DataFrame:
    return pd.concat([pq.read_table(file).to_pandas() for file in open_collection(folder).files], ignore_index=True)


def label(model, data, to, **given):
    """Label with settings by name."""
    others = {key: given.pop(key) for key in ("on", "progress") if key in given}
    return label_collection(str(model), str(data), to, LabelSettings(**given), **others)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("logits-*.parquet"))}


def test_every_row_of_every_format_once_with_its_own_logits(model, texts, tmp_path):
    """Rows shifted by one between windows, shards or files teach every student the neighbour's answer."""
    told: list[int] = []
    summary = label(
        model, texts, tmp_path / "out", rows_per_shard=16, precision="fp32", progress=lambda done, _: told.append(done)
    )
    assert (summary.rows, summary.rejected, summary.shards, summary.resumed) == (90, 0, 3 + 2 + 2, 0)
    assert told[0] == 0
    assert told[-1] == 90
    found = read_all(tmp_path / "out")
    given = rows(40, 1) + rows(30, 2) + rows(20, 3)
    assert found["id"].tolist() == [row["id"] for row in given]
    assert found["text"].tolist() == [row["text"] for row in given]
    logits = found[[LOGIT + name for name in TASK.label_names]].to_numpy()
    np.testing.assert_allclose(logits, Classifier.load(model).predict_logits(found["text"].tolist()), atol=1e-4)
    stored = read_collection(tmp_path / "out", task(names=("positive", "Negative")), "teacher.logits")
    np.testing.assert_array_equal(stored.logits, logits[:, ::-1])  # by name, not by position
    with pytest.raises(
        DataError, match=r"\(teacher\.logits\) has 2 labels .*Missing: neutral\. Label it with a teacher"
    ):
        read_collection(tmp_path / "out", task(names=("negative", "neutral", "positive")), "teacher.logits")
    bare = label(model, texts / "b.jsonl", tmp_path / "bare", texts=False)
    assert bare.rows == 30
    assert "text" not in read_all(tmp_path / "bare")


def test_a_folder_of_texts_leads_to_no_file_outside(model, texts, tmp_path):
    """A link in a folder from somebody else had the user's own files read and kept, and gave every row another id."""
    given = tmp_path / "given"
    given.mkdir()
    write_lines(given / "a.jsonl", rows(4, 1))
    (given / "same.jsonl").symlink_to("a.jsonl")
    (given / "b.jsonl").symlink_to(texts / "b.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a link out of .*; copy that file there, or label it by itself"):
        label(model, given, tmp_path / "out")
    assert label(model, given / "b.jsonl", tmp_path / "out").rows == 30
    (given / "b.jsonl").unlink()
    (given / "same.jsonl").unlink()
    # Of an earlier call's results every text was labelled again, and what it told of bad rows.
    assert [label(model, given, given / name).rows for name in ("first", "second")] == [4, 4]


def test_a_kill_between_any_two_writes_costs_one_shard(model, texts, tmp_path, monkeypatch):
    """A shard that is on disk but does not count, or counts twice, loses or doubles fifty thousand rows."""
    from kdlora.experiment import labelling

    undisturbed = label(model, texts, tmp_path / "whole", rows_per_shard=16)
    real, calls = labelling.write_note, []

    def fall_over(folder, shard):
        calls.append(shard.file)
        if len(calls) in (2, 5):  # the shard is there, its note is not
            raise KeyboardInterrupt
        real(folder, shard)

    monkeypatch.setattr(labelling, "write_note", fall_over)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            label(model, texts, tmp_path / "cut", rows_per_shard=16)
        with pytest.raises(DataError, match="unfinished; run the same kdlora label command again"):
            open_collection(tmp_path / "cut")
    summary = label(model, texts, tmp_path / "cut", rows_per_shard=16)
    assert summary.rows == undisturbed.rows
    assert summary.resumed == 16 + 16 + 8
    assert len(calls) == 7 + 2  # nothing but the two lost shards twice
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_finished_collection_is_not_labelled_again_and_a_damaged_shard_is(model, texts, tmp_path, monkeypatch):
    """Hours of labelling must not start anew because of one bad sector; nor may the sector go unnoticed."""
    out = tmp_path / "out"
    label(model, texts, out, rows_per_shard=16)
    before = contents(out)
    monkeypatch.setattr("kdlora.experiment.labelling.label_unit", lambda *_: pytest.fail("labelled again"))
    assert label(model, texts, out).resumed == 90, "by the number that it was begun with"
    nobody = label_collection(str(model), str(texts), out, LabelSettings(rows_per_shard=16), on="ray://127.0.0.1:1")
    assert nobody.resumed == 90  # nothing is left that a cluster would have to do
    monkeypatch.undo()
    damaged = out / "logits-00001-000000.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-9] + b"123456789")
    with pytest.raises(ArtifactError, match="is damaged since it was written"):
        read_collection(out, TASK, "teacher.logits")
    label(model, texts, out, rows_per_shard=16)
    assert contents(out) == before


def test_another_job_in_the_folder_is_refused(model, tmp_path):
    """Shards of two settings in one folder are logits of no teacher; two processes do everything twice."""
    out, source = tmp_path / "out", tmp_path / "in.jsonl"
    write_lines(source, rows(5, 1))
    label(model, source, out)
    with FileLock(out / ".lock"), pytest.raises(ArtifactError, match="another process labels into"):
        label(model, source, out)
    with pytest.raises(ArtifactError, match=r"are stale: max_length changed"):
        label(model, source, out, max_length=32)
    write_lines(source, rows(6, 1))
    with pytest.raises(ArtifactError, match="inputs changed"):
        label(model, source, out)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not empty and holds no labelled collection"):
        label(model, source, tmp_path / "letters")


def test_bad_rows_are_set_aside_with_their_reason(model, tmp_path):
    """One empty text among a hundred million must neither end the job nor get the label of an empty string."""
    source = tmp_path / "in.jsonl"
    lines = [*rows(3, 1), {"id": "empty", "text": " "}, *rows(2, 2)]
    source.write_text("".join(json.dumps(row) + "\n" for row in lines) + "not json\n")
    summary = label(model, source, tmp_path / "out", rows_per_shard=4)
    assert (summary.rows, summary.rejected) == (5, 2)
    assert read_all(tmp_path / "out")["id"].tolist() == [row["id"] for row in rows(3, 1) + rows(2, 2)]
    lines = "".join(file.read_text() for file in sorted((tmp_path / "out").glob("rejected-*"))).splitlines()
    found = [json.loads(line) for line in lines]
    assert [row["id"] for row in found] == ["empty", ""]
    assert "the text is empty" in found[0]["error"]
    with pytest.raises(DataError, match=r"in\.jsonl, row 4: the text is empty"):
        label(model, source, tmp_path / "strict", strict=True)
    write_lines(tmp_path / "none.jsonl", [{"text": ""}])
    with pytest.raises(DataError, match="none of the 1 rows can be labelled"):
        label(model, tmp_path / "none.jsonl", tmp_path / "none")
    (tmp_path / "header.csv").write_text("id,text\n")
    with pytest.raises(DataError, match=r"header\.csv has no rows"):
        label(model, tmp_path / "header.csv", tmp_path / "header")


def test_ids_are_unique_over_all_files(model, tmp_path, monkeypatch):
    """Row 0 is in every file: without the file's name, logits of one file would be attached to rows of another.

    Ids that the files name themselves were compared when all rows were labelled, for nothing.
    """
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.csv", "sub/b.csv"):
        write_csv(folder / name, [{"text": row["text"]} for row in rows(2, 1)])
    for _ in range(2):  # the output is no input of the next call
        label(model, folder, folder / "out")
        assert read_all(folder / "out")["id"].tolist() == ["a.csv:0", "a.csv:1", "sub/b.csv:0", "sub/b.csv:1"]
    (folder / "latest.csv").symlink_to(folder / "a.csv")  # was labelled twice, and refused at the end
    assert label(model, folder, tmp_path / "linked").rows == 4
    label(model, folder / "a.csv", tmp_path / "one")
    assert read_all(tmp_path / "one")["id"].tolist() == ["0", "1"]
    for name in ("a.csv", "sub/b.csv"):
        write_csv(folder / name, rows(2, 1))
    told = r"the id '1-r[01]' occurs more than once"
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "_load_teacher", lambda *_: pytest.fail("something was labelled"))
        with pytest.raises(DataError, match=f"{folder}: {told}"):
            label(model, folder, tmp_path / "double")
    assert not (tmp_path / "double").exists()
    mixed = write_lines(tmp_path / "mixed.jsonl", [{"text": "one"}, {"id": "0", "text": "two"}])
    found = label(model, mixed, tmp_path / "mixed")  # the number of the first row is the id of the second
    assert (found.rows, found.rejected) == (1, 1)
    assert "row 1: column 'id' is empty or missing" in next((tmp_path / "mixed").glob("rejected-*")).read_text()


def test_faults_of_the_user(model, texts, tmp_path, tiny_model_folder):
    """Each message says what to do."""
    with pytest.raises(DataError, match=r"no files of .*\.parquet"):
        label(model, tmp_path / "nothing-*.csv", tmp_path / "out")
    with pytest.raises(ConfigError, match="rows_per_shard is at least 1"):
        label(model, texts, tmp_path / "out", rows_per_shard=0)
    with pytest.raises(ModelError, match="LABEL_0, LABEL_1, which are no real names; give them"):
        label(tiny_model_folder("bert"), texts, tmp_path / "out")
    with pytest.raises(DataError, match="no column 'body'"):
        label(model, texts, tmp_path / "out", text=("body",))
    with pytest.raises(DataError, match=r"trained on single texts, got the text 'text' and 'id'\. Name one column"):
        label(model, texts, tmp_path / "out", text=("text", "id"))
    assert not (tmp_path / "out").exists()  # begun with wrong columns, it would refuse the right ones
    for file in ("a.parquet", "b.jsonl", "c.csv"):
        with pytest.raises(DataError, match=rf"{file}: no column 'nope'; there are id, text"):
            label(model, texts / file, tmp_path / "out", id_column="nope")
    (plain := tmp_path / "plain").mkdir()
    (plain / "notes.txt").write_text("a quiet film\n", encoding="utf-8")
    with pytest.raises(DataError, match="one text a line, which has no columns"):
        label(model, plain, tmp_path / "notes", text=("body",))
    (plain / "rows.csv").write_text("number,body\n7,a loud film\n", encoding="utf-8")
    assert label(model, plain, tmp_path / "notes", text=("body",)).rows == 2  # the column is the other file's
    with pytest.raises(ConfigError, match=r"--on takes ray, or ray://HOST:PORT"):
        label(model, texts / "b.jsonl", tmp_path / "ray", on="spark")


def test_logits_keep_their_number_format_on_another_machine(model, workshop, texts, tmp_path, monkeypatch):
    """A folder that a GPU began in bf16 took no further seed on a CPU: its logits were "stale", for good."""
    run = {"arms": ["kd-lora"], "precision": "auto"}
    config, layout = workshop.config({"teacher": {"fine_tuned": str(model)}, "run": run}), ExperimentLayout(tmp_path)
    label_training_rows(config, layout)
    found = json.loads(layout.precision.read_text())["cpu"][0]
    layout.precision.write_text(json.dumps({"cpu": ["fp32" if found == "bf16" else "bf16", "as another machine is"]}))
    label_training_rows(config, layout)
    # In fp16, which no CPU would choose.
    begun = ExperimentLayout(tmp_path / "half")
    write_json_atomic(begun.precision, {"cpu": ["fp16", "as an older GPU is"]})
    label_training_rows(config, begun)
    with monkeypatch.context() as patch:
        patch.setattr(labelling, "resolve_precision", lambda *_: ("fp16", "as an older GPU is"))
        label(model, texts / "b.jsonl", tmp_path / "more")
    label(model, texts / "b.jsonl", tmp_path / "more")


def test_a_collection_teaches_an_experiment(model, workshop, texts, tiny_model_folder, tmp_path):
    """A collection is there so that the teacher need not read it again; as a table it covers the training rows."""
    label(model, texts, tmp_path / "labelled", rows_per_shard=16)
    sections = {"data": {"unlabelled": str(tmp_path / "labelled")}, "run": {"arms": ["kd-lora"]}}
    config = workshop.config(sections | {"teacher": {"fine_tuned": str(model)}})
    layout = ExperimentLayout(tmp_path / "experiment")
    label_training_rows(config, layout)
    assert not layout.unlabelled_logits.exists()
    record = train_run(config, layout, "kd-lora", 0, lambda event: None)
    left_out = 90 - record.rows["unlabelled"]
    assert any(f"{left_out} of 90 unlabelled rows" in note for note in record.notes)
    windows = workshop.config(
        {"data": sections["data"] | {"long_texts": "windows"}, "teacher": {"fine_tuned": str(model)}}
    )
    with pytest.raises(ArtifactError, match="its long texts were not read as this experiment reads them"):
        label_training_rows(windows, ExperimentLayout(tmp_path / "windows"))
    label(model, workshop.train, tmp_path / "train")
    teacher = {"run": sections["run"], "teacher": {"model": None, "logits": str(tmp_path / "train")}}
    for collection, count in ((None, 0), ("labelled", 1)):
        data = {"unlabelled": collection and str(tmp_path / collection)}
        table = workshop.config(teacher | {"data": data})
        splits = load_splits(table.task, table.data)
        assert len(check_table(table, splits).notes) == len(splits.notes) + count  # rows left out
    train = read_rows(workshop.train)
    turned = [{**row, "text": other["text"]} for row, other in zip(train, train[1:] + train[:1], strict=True)]
    other = workshop.config(teacher | {"data": {"train": str(write_csv(tmp_path / "turned.csv", turned))}})
    told = rf"was labelled with other texts: {len(train)} of its ids, first '{train[0]['id']}'"
    with pytest.raises(DataError, match=told):  # of the same ids, as where both files have none and one was shuffled
        check_table(other, load_splits(other.task, other.data))
    foreign = {"data": {"unlabelled": str(write_collection(tmp_path / "foreign"))}}
    with pytest.raises(ConfigError, match="that M labelled, and one teacher teaches all rows"):
        check_table(workshop.config(teacher | foreign), splits)

    # Two teachers of one name, one of them trained a little longer, look alike in every config.
    save_encoder(load_encoder(str(tiny_model_folder("bert")), TASK, seed=4), tmp_path / "other")
    config = workshop.config(sections | {"teacher": {"fine_tuned": str(tmp_path / "other")}})
    with pytest.raises(ArtifactError, match="was labelled with other weights"):
        label_training_rows(config, ExperimentLayout(tmp_path / "again"))


def test_words_are_labelled_as_they_are_given(tiny_model_folder, tmp_path):
    """A collection that answers for other words than those of the file cannot teach on it, or teaches nonsense."""
    kind = Task("tokens", ("words",), ("tags",), tag_names(("BAD", "GOOD", "PLACE")), ("entity_f1",))
    save_encoder(load_encoder(str(tiny_model_folder("bert")), kind, seed=4), tmp_path / "model")
    given = tagged_rows(20)
    given[3]["words"][0] = "#what-ever"
    files = [write_conll(tmp_path / "a.conll", given), write_lines(tmp_path / "a.jsonl", given)]
    files[1].write_text(files[1].read_text().replace("\n", "\n\n", 1))
    with files[1].open("a") as file:
        file.write('{"words": ["a", 3]}\n{"words": [" "]}\n{"words": "plain, text"}\n')
    for file, count, bad in ((files[0], 20, 0), (files[1], 21, 2)):
        summary = label(tmp_path / "model", file, tmp_path / f"{file.suffix}-out")
        assert (summary.rows, summary.rejected) == (count, bad)
        found = read_all(tmp_path / f"{file.suffix}-out")
        assert found["id"].tolist() == [*map(str, range(20)), *(["22"] if bad else [])]
        for row, wanted in zip(found.itertuples(), given, strict=False):
            assert [row.text[a:b] for a, b in zip(row.starts, row.ends, strict=True)] == wanted["words"]
    rejected = (tmp_path / ".jsonl-out" / "rejected-00000-000000.jsonl").read_text()
    assert "row 21: expected a list of words" in rejected
    assert "row 22: no words" in rejected
    data = DataConfig(train=str(files[0]))
    rows = load_splits(TaskConfig(label_names=("BAD", "GOOD", "PLACE")), data).train
    taught = read_collection(tmp_path / ".conll-out", kind, "teacher.logits").attach(rows)
    assert len(taught["teacher_logits"][0]) == 7 * len(rows["starts"][0])
