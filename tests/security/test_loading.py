"""Doors at loading an export: a graph, a tokenizer or settings that somebody else wrote, who means no good."""

import shutil
from pathlib import Path
from typing import Any

import graphs
import numpy as np
import onnx
import onnxruntime
import pytest

import tiny
from deploy_folders import TEXTS
from experiments import edit_json
from kdlora.data.tasks import Task
from kdlora.deploy.export import finish_package, start_package
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.errors import ArtifactError, KdLoraError


def refused(folder: Path, *expected: str, verify: bool = True, **options: Any) -> None:
    """An ONNX folder, or the use of it, is refused as a user's mistake."""
    with pytest.raises(KdLoraError) as caught:
        Classifier.load(folder, verify=verify, **options).predict(["a wonderful film", "a dreadful one, and too long"])
    for part in expected:
        assert part in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("location", ["../secret.bin", "{root}/secret.bin", "inside.bin"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_graph_reads_no_other_file(graph_folder, monkeypatch, location, nested):
    """Runtimes up to 1.23 took any path: what lay there came out as answers. A newer one may forget again."""
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was reached"))
    root = graph_folder.parent
    for file in (root / "secret.bin", graph_folder / "inside.bin"):
        file.write_bytes(graphs.table().tobytes())
    graphs.build_graph(graph_folder / "model.onnx", location=location.format(root=root), nested=nested)
    refused(graph_folder, "model.onnx", "save it as one file")


def test_a_folder_of_the_hubs_cache_is_read(served, tmp_path, monkeypatch):
    """The cache consists of links; refusing all of them would refuse every model of the Hub."""
    expected = Classifier.load(served).predict_logits(TEXTS[:4])
    graphs.build_graph(served / "model.onnx", location="model.onnx_data")
    (served / "model.onnx_data").write_bytes(graphs.table().tobytes())
    monkeypatch.chdir(served)
    onnx.save(onnx.load("model.onnx"), "model.onnx")  # what the refusal of weights in another file says
    blobs, snapshot = tmp_path / "cache" / "blobs", tmp_path / "cache" / "snapshots" / "0123" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in served.iterdir():
        shutil.copy(file, blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(f"../../../blobs/hash-{file.name}")
    np.testing.assert_array_equal(Classifier.load(snapshot).predict_logits(TEXTS[:4]), expected)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json", "config.json"])
def test_no_file_of_an_export_is_a_link_out_of_its_folder(served, tmp_path, name):
    """A tokenizer's settings that were a link to `kaggle.json` were copied to the page for the browser, key and all."""
    secret = (served / name).rename(tmp_path / "kaggle.json")
    (served / name).symlink_to(secret)
    (served / "loop").symlink_to("loop")
    refused(served, f"{name} is a link out of its folder")
    (served / "deep").mkdir()
    secret.rename(served / "deep" / "real")  # in the folder, as Kubernetes mounts files and git-annex keeps them
    (served / name).unlink()
    (served / name).symlink_to("deep/real")
    assert Classifier.load(served).predict(["a wonderful film"])


def test_what_is_no_graph_is_refused(graph_folder, monkeypatch):
    """A reader of a hostile message must end, and say which file it was; the runtime's own format names files, too."""
    for content in (b"\x00" * 9, b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 64):
        (graph_folder / "model.onnx").write_bytes(content)
        refused(graph_folder, "cannot load it")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: pytest.fail("the runtime was reached"))
    (graph_folder / "model.onnx").write_bytes(b"abcdORTM" + b"\x00" * 99)
    refused(graph_folder, "own format")


_SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
_SINGLE = [{"SpecialToken": {"id": "X", "type_id": 0}}]
_TEMPLATE = {"type": "TemplateProcessing", "single": _SINGLE, "pair": [], "special_tokens": {}}
PANICS: dict[str, dict[str, Any]] = {
    "when it is read": {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
    "at a text": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "at a pattern": {"pre_tokenizer": _SPLIT},
    "at its own words": {"post_processor": _TEMPLATE},
}


@pytest.mark.parametrize("changes", PANICS.values(), ids=PANICS)
def test_a_panic_of_the_tokenizer_is_an_error_like_others(served, changes):
    """A panic is no `Exception`: it went past every handler of a service and ended it."""
    edit_json(served / "tokenizer.json", **changes)
    with pytest.raises(ArtifactError, match=r"tokenizer.json: the tokenizer (cannot be read|fails on a text)"):
        Classifier.load(served).predict([f"a wonderful {'a' * 60}!"])


@pytest.mark.parametrize("output", ["text", "sequence", "int", "one"])
def test_a_graph_that_gives_no_logits_is_refused(graph_folder, output):
    """One row for all texts was taken for the answer to each; other kinds ended in a traceback."""
    graphs.build_graph(graph_folder / "model.onnx", output=output)
    refused(graph_folder, "model")


SETTINGS: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("architectures a number", "config.json", {"architectures": 5}, ("architectures must be",)),
    ("a problem that is a list", "config.json", {"problem_type": ["regression"]}, ("problem_type must be",)),
    ("labels that are a list", "config.json", {"id2label": ["a", "b"]}, ("id2label must be",)),
    ("labels from 1", "config.json", {"id2label": {"1": "a", "2": "b"}}, ("id2label must name the columns 0 to n-1",)),
    ("an unknown problem", "config.json", {"problem_type": "ranking"}, ("problem_type must be one of",)),
    ("labels that are objects", "config.json", {"id2label": {"0": {}, "1": "b"}}, ("id2label must name",)),
    ("equal labels", "config.json", {"id2label": {"0": "a", "1": "a"}}, ("two labels named 'a'",)),
    ("half a character", "config.json", {"id2label": {"0": "\ud800", "1": "b"}}, ("config.json is damaged",)),
    ("a padding list", "config.json", {"pad_token_id": [0]}, ("pad_token_id must be",)),
    ("a padding beyond the words", "config.json", {"pad_token_id": 99999}, ("pad_token_id 99999",)),
    ("no room for tokens", "config.json", {"max_position_embeddings": 2}, ("leaves room for 2 tokens",)),
    ("a temperature that is text", "config.json", {"kdlora_temperature": "1"}, ("kdlora_temperature",)),
    ("a temperature of nothing", "config.json", {"kdlora_temperature": 1e-300}, ("kdlora_temperature",)),
    ("a reading length that is text", "config.json", {"kdlora_max_length": "9"}, ("kdlora_max_length must be",)),
    ("a task that is text", "config.json", {"kdlora_task": "x"}, ("kdlora_task must be",)),
    ("a task of three texts", "config.json", {"kdlora_task": {"text": ["a", "b", "c"]}}, ("kdlora_task must be",)),
    ("windows of text", "config.json", {"kdlora_task": {"windows": {"stride": "4", "pool": "max"}}}, ("windows",)),
    ("a length that is text", "kdlora_export.json", {"max_length": "9"}, ("max_length must be",)),
    ("hashes that are a list", "kdlora_export.json", {"sha256": ["x"]}, ("sha256 must be",)),
    ("a limit that is text", "tokenizer_config.json", {"model_max_length": "9"}, ("model_max_length must be",)),
    ("a padding that is a number", "tokenizer_config.json", {"pad_token": 5}, ("pad_token must be",)),
]


@pytest.mark.parametrize(("file", "changes", "expected"), [case[1:] for case in SETTINGS], ids=[c[0] for c in SETTINGS])
def test_settings_of_a_wrong_type_are_named(served, file, changes, expected):
    """Each was a traceback, or an answer that nobody meant: of two labels with one name, one lost its probability."""
    if changes.get("pad_token_id") is not None:
        edit_json(served / "tokenizer_config.json", pad_token=None)
    edit_json(served / file, **changes)
    refused(served, file, *expected)


@pytest.mark.parametrize("name", ["config.json", "kdlora_export.json", "tokenizer_config.json"])
@pytest.mark.parametrize("levels", [80, 900, 99_999])
def test_deep_settings_are_refused(served, name, levels):
    """Too deep for Python's reader, or, worse, only for what copies and writes them later."""
    (served / name).write_text('{"a":' * levels + "1" + "}" * levels)
    refused(served, f"{name} is damaged", "nested too deep")


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An export as kdlora writes it."""
    source = graphs.build_folder(tmp_path / "source", problem_type="single_label_classification")
    graphs.build_graph(source / "model.onnx")
    described, work = read_model_folder(source), tmp_path / "export"
    work.mkdir()
    start_package(work, described, tiny.train_tokenizer("bert"))
    graphs.build_graph(work / "model.onnx")
    task = Task("single-label", ("text",), ("label",), graphs.LABELS, ("accuracy",))
    finish_package(work, described, task, ["model.onnx"], {})
    return work


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"id2label": {"0": "positive", "1": "negative"}}),
        ("config.json", {"kdlora_temperature": 9.0}),
        ("config.json", {"problem_type": "multi_label_classification"}),
        ("tokenizer_config.json", {"pad_token": "[MASK]"}),
        ("tokenizer.json", {"normalizer": None}),
        ("kdlora_export.json", {"max_length": 3}),
        ("kdlora_export.json", {"task": {"text": ["label"]}}),
        ("config.json", None),  # without it another default decides
        ("tokenizer_config.json", None),
    ],
)
def test_every_file_that_decides_an_answer_is_compared(exported, file, changes):
    """With the labels exchanged in config.json an export answered the opposite, and was called the verified one."""
    assert Classifier.load(exported).predict(["a wonderful film"])
    (exported / file).unlink() if changes is None else edit_json(exported / file, **changes)
    refused(exported, file)
    assert changes is None or Classifier.load(exported, verify=False).predict(["a wonderful film"])


def test_a_file_that_the_record_does_not_name_is_no_part_of_the_export(exported):
    """An int8 file that an earlier student left is what is taken first, and answered beside the new record."""
    shutil.copy(exported / "model.onnx", exported / "model_quantized.onnx")
    refused(exported, "model_quantized.onnx")
    assert Classifier.load(exported, verify=False).folder.precision == "int8"
    assert Classifier.load(exported, precision="fp32").predict(["a wonderful film"])
    (exported / "kdlora_export.json").unlink()
    assert Classifier.load(exported).predict(["a wonderful film"])


def test_the_file_that_was_compared_is_what_runs(exported, monkeypatch):
    """A file that is exchanged after it was hashed is another model."""
    expected = Classifier.load(exported).predict_logits(TEXTS[:4])
    opened = onnxruntime.InferenceSession

    def exchange(*arguments: Any, **options: Any) -> Any:
        (exported / "model.onnx").write_bytes(b"")
        return opened(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", exchange)
    np.testing.assert_array_equal(Classifier.load(exported).predict_logits(TEXTS[:4]), expected)
