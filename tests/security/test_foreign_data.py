"""Doors at data: cards, rows, tables and manifests that somebody else wrote, who means no good."""

import json
import math
import os
from decimal import Decimal
from pathlib import Path
from typing import Any

import graphs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from graphs import run_python

import hub_standin
from experiments import edit_json
from fabricate import make_experiment
from kdlora.configfile import COLLECTION_MANIFEST
from kdlora.data.logit_table import open_collection
from kdlora.data.opening import open_saved
from kdlora.data.read import open_file
from kdlora.data.tasks import Task
from kdlora.deploy.predict import Classifier
from kdlora.deploy.stream import predict_file
from kdlora.errors import ArtifactError, DataError
from kdlora.evidence.records import RunRecord, read_record, read_results
from kdlora.models.settings import read_licence
from kdlora.report.report import make_report
from kdlora.system.integrity import CHECKSUM, seal

CARDS = {
    "no date": ("license: apache-2.0\ndate: 2024-99-99", "apache-2.0"),
    "deep": ("license: mit\nx: " + "[" * 5_000, None),
    "a loop": ("license: &a\n- *a", None),
    "markup": ("license: <img src=x onerror=alert(1)>", None),
    "code": ("license: '`x` | [y](http://192.0.2.1)'", None),
    "an object": ("license: !!python/object/apply:os.system [true]", None),
    "long": ("license: " + "a" * 500, None),
    "usual": ("language: en\nlicense: cc-by-nc-sa-4.0", "cc-by-nc-sa-4.0"),
}


@pytest.mark.parametrize(("front", "expected"), CARDS.values(), ids=CARDS)
def test_a_card_costs_no_training_and_brings_no_markup(tmp_path, front, expected):
    """It is read when all training is done: a date that is none ended shipping. Its text was raw HTML in our card."""
    assert read_licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n")
    assert read_licence(str(tmp_path)) == expected


def test_an_endless_card_is_not_read_whole(tmp_path):
    """A card of gigabytes fills the memory for the sake of one word."""
    with (tmp_path / "README.md").open("wb") as file:
        file.write(b"---\nlicense: mit\n")
        file.truncate(8 << 30)
    assert read_licence(str(tmp_path)) is None


HOSTILE_ROWS: dict[str, tuple[str, str, str]] = {
    "deep JSON": ("rows.jsonl", '{{"text": {deep}}}\n{{"text": "good"}}\n', "nested too deep"),
    "an endless number": ("rows.jsonl", '{{"text": {digits}}}\n{{"text": "good"}}\n', "not JSON"),
    "a long line of text": ("rows.txt", "{long}\ngood\n", "longer than 100,000 characters"),
    "a long line of CSV": ("rows.csv", "text,b\n{long},1\ngood,1\n", "longer than 100,000"),
    "a line of many commas": ("rows.csv", "text,b\n{commas}\ngood,1\n", "longer than 100,000"),
}


@pytest.mark.parametrize(("name", "content", "expected"), HOSTILE_ROWS.values(), ids=HOSTILE_ROWS)
def test_a_hostile_row_costs_its_own_answer_and_no_other(served, tmp_path, monkeypatch, name, content, expected):
    """One line without an end filled the memory, and one deep object ended the command with a traceback."""
    monkeypatch.setattr("kdlora.data.lines.MOST_CHARACTERS", 100_000)  # the real limit would make it slow
    monkeypatch.setattr("kdlora.data.lines._CHUNK", 1000)
    fill = {"deep": "[" * 50_000, "digits": "9" * 5000, "long": "x" * 300_000, "commas": "," * 300_000}
    source, to = tmp_path / name, tmp_path / "answers.jsonl"
    source.write_text(content.format(**fill))
    summary = predict_file(Classifier.load(served), source, to)
    assert (summary.rows, summary.errors) == (2, 1)
    bad, good = (json.loads(line) for line in to.read_text().splitlines())
    assert expected in bad["error"]
    assert good["label"] in graphs.LABELS


LIMITED = """
import resource, sys
from kdlora.data.read import open_file
from kdlora.errors import DataError
source = open_file(sys.argv[1], "data.train")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28),) * 2)
try:
    source.read(("text",))
except DataError as refusal:
    print(refusal)
"""


def test_a_small_file_of_twenty_gigabytes_is_called_what_it_is(tmp_path):
    """It was called no readable Parquet, with the advice to write it in UTF-8."""
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array(["a" * 1_000_000]))
    bomb = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": texts}), bomb, compression="zstd", store_schema=False)
    assert bomb.stat().st_size < 1000
    done = run_python("-c", LIMITED, bomb)
    assert "need more memory than there is" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "metadata",
    [
        "no JSON",
        "[]",
        "[" * 99_999,
        '{"info": {"features": {"label": 5}}}',
        '{"info": {"features": {"label": []}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
        '{"info": {"features": {"label": {"_type": "ClassLabel", "names": [1]}}}}',
    ],
)
def test_metadata_of_a_parquet_file_are_no_traceback(tmp_path, metadata):
    """They are anybody's bytes. Passed over, codes would be taken for names."""
    table = pa.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": metadata})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match="metadata 'huggingface'"):
        open_file(tmp_path / "x.parquet", "data.train").read(("text", "label"))


def test_a_damaged_page_of_parquet_is_no_traceback(served, tmp_path):
    """The footer is sound, so the fault comes in the middle."""
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"text": [f"a film {number}" for number in range(2000)]}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[40:2000] = b"\xff" * 1960
    path.write_bytes(content)
    with pytest.raises(DataError, match="no readable Parquet"):
        predict_file(Classifier.load(served), path, tmp_path / "x.csv")


MANIFESTS: dict[str, dict[str, Any]] = {
    "a shard above": {"shards": [{"file": "../secret.parquet", "sha256": "", "truncated": 0}]},
    "an absolute shard": {"shards": [{"file": "/etc/passwd", "sha256": "", "truncated": 0}]},
    "no texts": {"texts": "1"},
    "another version": {"schema_version": [1]},
}


@pytest.mark.parametrize("changes", [*MANIFESTS.values(), "[" * 99_999], ids=[*MANIFESTS, "deep"])
def test_a_collection_reads_its_own_shards(tmp_path, changes):
    """A manifest that names another file has it read as rows; that of a teacher's logits is read by the same lines."""
    content = {"schema_version": 1, "complete": True, "fingerprint": "x", "ingredients": {"weights": "x"}}
    content |= {"model": "x", "label_names": ["a", "b"], "texts": 1, "versions": {}, "shards": []}
    text = changes if isinstance(changes, str) else json.dumps(content | changes)
    (tmp_path / COLLECTION_MANIFEST).write_text(text)
    with pytest.raises(DataError, match=COLLECTION_MANIFEST):
        open_collection(tmp_path)
    (tmp_path / COLLECTION_MANIFEST).write_text(json.dumps(content))
    assert open_collection(tmp_path).label_names == ["a", "b"]


def test_a_saved_data_set_reads_its_own_files(tmp_path):
    """`load_from_disk` joins whatever name the folder gives."""
    from datasets import Dataset, DatasetDict

    data = Dataset.from_dict({"text": ["a"], "label": ["x"]})
    DatasetDict({"train": data}).save_to_disk(tmp_path / "whole")
    data.save_to_disk(tmp_path / "secret")
    assert set(open_saved(tmp_path / "whole")) == {"train"}
    (tmp_path / "whole" / "dataset_dict.json").write_text(json.dumps({"splits": ["../secret"]}))
    with pytest.raises(DataError, match=r"dataset_dict\.json"):
        open_saved(tmp_path / "whole")
    place = tmp_path / "secret" / "state.json"
    name = str(next((tmp_path / "whole" / "train").glob("*.arrow")))
    (tmp_path / "secret" / "x.arrow").symlink_to(name)
    names = ("x.arrow", name, "../whole/train/x.arrow")
    for spoilt in (*([{"filename": one}] for one in names), [{}], [5], 7):
        edit_json(place, _data_files=spoilt)
        with pytest.raises(DataError, match="secret"):
            open_saved(tmp_path / "secret")
    features = {"text": {"languages": ["en"], "_type": "Translation"}, "label": {"dtype": "string", "_type": "Value"}}
    edit_json(tmp_path / "whole" / "train" / "dataset_info.json", features=features)
    with pytest.raises(DataError, match="no readable save_to_disk folder"):
        open_saved(tmp_path / "whole" / "train")
    place.write_text("[" * 99_999)
    with pytest.raises(DataError, match=r"state\.json"):
        open_saved(tmp_path / "secret")


DATA_CARDS = {
    "absolute": ("data_files: [{{split: train, path: {secret}}}]", "which this data set does not hold"),
    "a scheme": ("data_files: 'file://{secret}'", "which this data set does not hold"),
    "a folder": ("data_dir: {folder}", "which this data set does not hold"),
    "another host": ("data_files: '{url}/stolen.csv'", "which this data set does not hold"),
    "another data set": ("data_files: 'hf://datasets/someone/private/train.csv'", "which this data set does not hold"),
    "upwards": ("data_files: 'a/../../../x.csv'", "which this data set does not hold"),
    "a merge": ("<<: {{data_files: '{url}/stolen.csv'}}", "which this data set does not hold"),
    "behind dashes": ("---a: b\n  data_files: '{url}/stolen.csv'", "which this data set does not hold"),
    "a circle": ("data_files: &a [*a]", "its card README.md cannot be read"),
    "no text": ("? [a]\n  : b", "its card README.md cannot be read"),
    "no list": ("data_files: train.csv\n- 5", "cannot be loaded from the Hub"),
    "usual": ("data_files: [{{split: train, path: train.csv}}]", "('text', 'label')"),
}
HUB = """
import sys, tiny
from kdlora.data.opening import open_hub
from kdlora.errors import KdLoraError
from kdlora.models.encoders import load_encoder
for name in sys.argv[1:]:
    try:
        got = load_encoder(name, tiny.task(), seed=0) if "model" in name else open_hub(name, None, None)["train"]
        print(got.columns)
    except KdLoraError as refusal:
        print(" ".join(str(refusal).split()))
"""


def test_what_the_hub_sends_leads_to_no_other_file_host_or_base_and_to_no_pickle(classifier, tmp_path):
    """`datasets` before 5.1 reads `/home/you/secret.csv` as rows; every version asks the host that a card names.

    With an adapter's settings beside a model, transformers went to a base that nobody named, and said nothing.
    """
    secret = tmp_path / "secret" / "x.csv"
    secret.parent.mkdir()
    secret.write_text("text,label\nsecret,1\n")
    files = {path.name: path.read_bytes() for path in classifier.iterdir()}
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "stranger/base", "target_modules": ["query"]}
    index = {"metadata": {}, "weight_map": {"a": "pytorch_model.bin"}}
    pickled = {"model.safetensors.index.json": json.dumps(index).encode(), "pytorch_model.bin": b"never read"}
    expected = {
        "someone/model-and-adapter": "beside a whole model",
        "someone/model-of-pickles": "in the same folder",
    }
    with hub_standin.running() as hub:
        for number, (card, told) in enumerate(DATA_CARDS.values()):
            front = card.format(secret=secret, folder=secret.parent, url=hub.url)
            readme = f"---\nconfigs:\n- config_name: default\n  {front}\n---\n".encode()
            hub.add(f"someone/d{number}", {"README.md": readme, "train.csv": b"text,label\nopen,0\n"}, kind="datasets")
            expected[f"someone/d{number}"] = told
        hub.add("stranger/base", files)
        hub.add("someone/model-and-adapter", files | {"adapter_config.json": json.dumps(adapter).encode()})
        del files["model.safetensors"]
        hub.add("someone/model-of-pickles", files | pickled)
        environment = os.environ | hub_standin.environment(hub, str(tmp_path / "cache"))
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(hub_standin.__file__).parent), os.environ["PYTHONPATH"]])
        done = run_python("-c", HUB, *expected, env=environment)
        said = done.stdout.splitlines()
        assert len(said) == len(expected), done.stderr
        for line, (name, told) in zip(said, expected.items(), strict=True):
            assert told in line, (name, line)
        assert not [asked for asked in hub.unknown if "stolen" in asked]
        assert not list((tmp_path / "cache").rglob("models--stranger--base"))
        assert not list((tmp_path / "cache").rglob("pytorch_model.bin"))


@pytest.mark.parametrize("content", ["[" * 99_999, '{"runs": ' + "9" * 5000 + "}"], ids=["deep", "an endless number"])
def test_records_of_somebody_elses_experiment_are_no_traceback(tmp_path, content):
    """`kdlora report` and `compare` read folders that colleagues send."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(ArtifactError, match=r"results\.json"):
        read_record(tmp_path / "results.json")


@pytest.mark.parametrize("config", [{"teacher": 5}, {"student": {"model": 5}}, {"data": {"augment": "twice"}}])
def test_a_record_with_a_config_that_is_none_is_refused(tmp_path, config):
    """What a report, a comparison or a card reads of it was a traceback there."""
    record = RunRecord(experiment="x", task={}, arm="fft", seed=0, status="failed", model="m").model_dump()
    (tmp_path / "run.json").write_text(json.dumps(seal(record | {"config": config})))
    with pytest.raises(ArtifactError, match=r"run\.json: expected a run record, but config"):
        read_record(tmp_path / "run.json")


RECORDS: dict[str, tuple[str, dict[str, Any]]] = {
    "an endless count of the plan": ("plan", {"duplicates": {"train and validation": math.inf}}),
    "a huge latency": ("benchmark", {"models": [10**400]}),
    "an endless size": ("record", {"size_bytes": 10**400, "train_seconds": math.inf}),
}


@pytest.mark.parametrize(("name", "changes"), RECORDS.values(), ids=RECORDS)
def test_numbers_without_an_end_cost_no_report(tmp_path, name, changes):
    layout = make_experiment(tmp_path, seeds=(0,), rows=40)
    path = layout.run("kd-lora", 0).record if name == "record" else getattr(layout, name)
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {key: value for key, value in (content | changes).items() if key != CHECKSUM}
    path.write_text(json.dumps(seal(content) if name == "record" else content))
    assert "KD-LoRA" in make_report(tmp_path, draws=10).html


def test_a_metric_that_is_none_is_refused(tmp_path):
    task = {"kind": "single-label", "text": ["text"], "label": ["label"], "label_names": ["a", "b"], "metrics": ["x"]}
    with pytest.raises(DataError, match="'x' is no metric of a single-label task"):
        Task.from_dict(task)


@pytest.mark.parametrize("verb", ["report", "compare"])
def test_a_report_reads_no_link_and_waits_for_no_pipe(cli, tmp_path, verb):
    """Texts behind a link were quoted in the page; a pipe in place of a file had the report wait for ever."""
    layout = make_experiment(tmp_path / "theirs", seeds=(0,), rows=40)
    layout.examples.rename(tmp_path / "private.parquet")
    layout.examples.symlink_to(tmp_path / "private.parquet")
    assert "examples.parquet is a link" in cli(verb, layout.root, code=2).err
    layout.examples.unlink()
    os.mkfifo(layout.benchmark)
    assert "benchmark.json is neither a file nor a folder" in cli(verb, layout.root, code=2).err


COLUMNS = [
    *(("logit:negative", value) for value in ("x", [1.0], float("nan"))),
    *(("label", value) for value in (9, -1, "a", [1, 2], {"a": 1}, Decimal("1.5"))),
    *(("id", None), ("text", None), ("text", [5]), ("text_pair", [5])),
]


@pytest.mark.parametrize(("name", "value"), COLUMNS)
def test_predictions_and_texts_of_somebody_elses_run_cost_no_report(tmp_path, name, value):
    """Numbers out of range were looked up as labels, and ended the report in a traceback; texts may be none."""
    layout = make_experiment(tmp_path, seeds=(0,), rows=40)
    path = layout.examples if name.startswith("text") else layout.run("kd-lora", 0).predictions
    table = pq.read_table(path)
    filled = table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))
    pq.write_table(filled, path)
    html = make_report(tmp_path, draws=10).html
    lost = "kd-lora, seed 0: its predictions cannot be read" in html
    assert lost == (path != layout.examples)
    assert lost or "Where teacher and student disagree" in html
