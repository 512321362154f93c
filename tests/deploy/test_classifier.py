"""The classifier: the same answers from every backend, without torch where there is an ONNX file, calibrated."""

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy_folders import LONG, PAIRS, TEXTS
from experiments import edit_json
from kdlora.deploy.calibrate import fit_temperature, save_temperature
from kdlora.deploy.cascade import Cascade
from kdlora.deploy.export import export_onnx
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.predict import Classifier
from kdlora.deploy.stream import predict_file
from kdlora.deploy.tagger import Tagger
from kdlora.errors import ArtifactError, DataError, ModelError
from kdlora.evidence.metrics import probabilities
from kdlora.extras import EXTRAS, MissingExtraError

BLOCKED = {*(name for modules in EXTRAS.values() for name in modules), "pydantic", "yaml", "typer"}


def test_onnx_folders_need_no_torch(exported, tmp_path):
    """Prevents a serving image of gigabytes: the packages are made unimportable, then texts are read."""
    (tmp_path / "rows.txt").write_text(f"{TEXTS[0]}\n")
    code = f"""
import sys
for name in {BLOCKED!r}:
    sys.modules[name] = None
from kdlora import Cascade, Tagger, redact_file
from kdlora.deploy.predict import Classifier
from kdlora.deploy.stream import predict_file
classifier, tagger = Classifier.load({str(exported())!r}), Tagger.from_pretrained({str(exported("bert", "tokens"))!r})
print(classifier.predict([{TEXTS[0]!r}])[0].label, len(tagger.predict({TEXTS[0]!r})))
for model in (classifier, tagger):
    print(predict_file(model, {str(tmp_path / "rows.txt")!r}, {str(tmp_path / "out.jsonl")!r}).rows)
print(redact_file(tagger, {str(tmp_path / "rows.txt")!r}, {str(tmp_path / "out.txt")!r}).rows)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    label = Classifier.load(exported()).predict(TEXTS[:1])[0].label
    count = len(Tagger.load(exported("bert", "tokens")).predict(TEXTS[0]))
    assert done.stdout.split() == [label, str(count), "1", "1", "1"]


@pytest.fixture(scope="module")
def plain(classifier_folder) -> Classifier:
    return Classifier.load(classifier_folder())


ANY = st.text(st.characters(exclude_categories=("Cs",)), max_size=200).filter(str.strip)


@given(texts=st.lists(ANY, min_size=1, max_size=6))
def test_any_text_gets_an_answer_that_does_not_depend_on_its_neighbours(plain, texts):
    """Prevents a text that the tokenizer turns into nothing, or that shifts the others of its batch."""
    together = plain.predict_logits(texts)
    assert np.isfinite(together).all()
    alone = np.concatenate([plain.predict_logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_threads_share_a_classifier(exported):
    """Prevents mixed-up answers under concurrent calls of a server."""
    model = Classifier.load(exported(), threads=1)
    expected = {text: model.predict_logits([text]) for text in TEXTS[:8]}
    asked = list(expected) * 20
    with ThreadPoolExecutor(len(expected)) as pool:
        found = list(pool.map(lambda text: model.predict_logits([text]), asked))
    assert all(np.array_equal(logits, expected[text]) for text, logits in zip(asked, found, strict=True))

    # A second text that is dropped, or segments that are all 0.
    model = Classifier.load(exported(), precision="fp32")
    with pytest.raises(ModelError, match="is not int8: leave precision out"):  # it was passed over
        Classifier.load(exported() / "model.onnx", precision="int8")
    swapped = [(second, first) for first, second in PAIRS]
    assert np.abs(model.predict_logits(PAIRS) - model.predict_logits(swapped)).max() > 1e-2
    assert np.abs(model.predict_logits(PAIRS) - model.predict_logits([a for a, _ in PAIRS])).max() > 1e-2
    assert all(arrays["token_type_ids"].max() == 1 for arrays in model.batches(PAIRS))


@pytest.mark.usefixtures("traced_once")
def test_single_texts_and_pairs_are_not_taken_for_each_other(trained_on, tmp_path):
    """A label for nothing, for a pair by a model that has only read single texts, or for half of what it compares."""
    single, pairs = Classifier.load(trained_on("review")), Classifier.load(trained_on("premise", "hypothesis"))
    assert len(single.predict(TEXTS[:2])) == len(pairs.predict(PAIRS[:2])) == 2
    with pytest.raises(DataError, match="text 1: expected one text, as the model was trained on, got a pair"):
        single.predict([TEXTS[0], PAIRS[0]])
    with pytest.raises(DataError, match="text 0: expected a pair of texts, as the model was trained on, got one text"):
        pairs.predict(TEXTS[0])
    with pytest.raises(DataError, match="text 1: expected a text or a pair of texts, got 3 values"):
        pairs.predict([PAIRS[0], ("one", "two", "three")])
    with pytest.raises(DataError, match="text 1: the text is empty"):
        single.predict([TEXTS[0], ""])
    export_onnx(pairs.folder.path, tmp_path / "onnx", formats=("onnx",))  # checked on pairs, made up though they are
    with pytest.raises(DataError, match="expected a pair"):
        Classifier.load(tmp_path / "onnx").predict_logits(TEXTS[:1])


def test_nothing_one_text_and_no_torch(exported, classifier_folder, tmp_path, monkeypatch):
    """Prevents a crash on an empty list, a string taken for letters, an ImportError where a pip command helps."""
    model = Classifier.from_pretrained(exported())
    assert model.predict([]) == []
    assert model.predict("wonderful") == model.predict(["wonderful"])
    with pytest.raises(DataError, match="text 0: the text is empty"):
        model.predict("")
    for blanks in (19_000, 20_000):  # of which a cut to 20,000 characters leaves nothing else
        assert np.array_equal(model.predict_logits(" " * blanks + "wonderful"), model.predict_logits("wonderful"))
    monkeypatch.setitem(sys.modules, "peft", None)  # what only a training needs
    assert len(Classifier.load(classifier_folder()).predict(["wonderful"])) == 1
    monkeypatch.delitem(sys.modules, "kdlora.deploy.torch_backend")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"unlike an export \(.*needs torch, .*pip install 'kdlora\[train\]'"):
        Classifier.load(classifier_folder())
    shutil.copytree(classifier_folder(), tmp_path / "student")
    shutil.copytree(exported(), tmp_path / "student-onnx")
    (tmp_path / "in.txt").write_text("wonderful\n")
    assert predict_file(tmp_path, tmp_path / "in.txt", tmp_path / "out.jsonl").errors == 0, "an experiment's export"


def test_what_holds_no_texts_is_refused(exported):
    """Prevents the label of a column's name, or entities in single letters."""
    model, tagger = Classifier.load(exported()), Tagger.load(exported("bert", "tokens"))
    cascade, table = Cascade(model, model, 0.5), pd.DataFrame({"text": TEXTS[:3]})
    calls = (model.predict, model.batches, cascade.predict, tagger.predict, tagger.batches)
    for call in calls:
        for texts in (table, {"text": TEXTS}, None, b"text", 5):
            with pytest.raises(DataError, match=f"list of texts, got {type(texts).__name__}. Of a table, give the col"):
                list(call(texts))
    expected = model.predict_logits(TEXTS[:3])
    for texts in (table["text"], table["text"].to_numpy(dtype=str), iter(TEXTS[:3])):
        assert np.array_equal(model.predict_logits(texts), expected)
    assert np.array_equal(tagger.predict_logits(TEXTS[0]), tagger.predict_logits(TEXTS[:1]))


def test_a_threshold_of_numpy_is_a_number_and_nan_is_none(exported):
    """Prevents a cascade that never asks its teacher, or refuses the threshold that a user's own search found."""
    model = Classifier.load(exported())
    assert len(Cascade(model, model, np.float32(0.5)).predict(TEXTS[:2])) == 2
    for threshold in (float("nan"), np.float32("nan"), "0.5", None):
        with pytest.raises(DataError, match="threshold of a cascade must be a number"):
            Cascade(model, model, threshold)
    # Both were tracebacks, and only at the first text that was handed on.
    with pytest.raises(ModelError, match="a function of texts; got None"):
        Cascade(model, None, 0.5)
    with pytest.raises(DataError, match="a label for each of 1 texts from the teacher, got None"):
        Cascade(model, lambda texts: None, 2.0).predict(TEXTS[:1])


def test_few_encodings_are_held_at_a_time(exported, monkeypatch):
    """Prevents 4 GB for 100,000 texts, most of it of what is cut off."""
    model = Classifier.load(exported(), precision="fp32")
    texts, encode, sizes = [*TEXTS, LONG], model._tokenizer.encode_batch, []
    expected = model.predict_logits(texts)
    recorded = SimpleNamespace(encode_batch=lambda some: sizes.append(sum(map(len, some))) or encode(some))
    monkeypatch.setattr(model, "_tokenizer", recorded)
    monkeypatch.setattr("kdlora.deploy.network._ENCODED_CHARACTERS", 200)
    assert np.array_equal(model.predict_logits(texts), expected)
    assert sum(sizes) == sum(map(len, texts))
    assert len(sizes) > 10


def test_long_texts_are_truncated_at_once(exported, classifier_folder, tmp_path):
    """Prevents positions beyond the table, and ten megabytes being tokenised to keep 64 tokens."""
    for folder in (exported(), classifier_folder("roberta")):
        model = Classifier.load(folder)
        assert model.folder.max_length == 64
        start = time.perf_counter()
        huge = model.predict_logits([LONG * 12_000])
        assert time.perf_counter() - start < 2
        assert np.array_equal(huge, model.predict_logits([LONG]))

    # RoBERTa's off-by-two: its table starts behind the padding position.
    folder = shutil.copytree(classifier_folder("roberta"), tmp_path / "model")
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    padding = json.loads((folder / "config.json").read_text())["pad_token_id"]
    limit = 66 - padding - 1
    assert [read_model_folder(folder, max_length=most).max_length for most in (None, 1000, 16)] == [limit, limit, 16]
    assert np.isfinite(Classifier.load(folder).predict_logits([LONG * 10])).all()
    for family in ("ibert", "longformer", "roberta-prelayernorm", "xmod"):
        edit_json(folder / "config.json", model_type=family)
        assert read_model_folder(folder).max_length == limit, family


def test_incomplete_and_changed_folders_are_named(exported, classifier_folder, tmp_path):
    """Prevents a traceback where a file is missing or means something else, or the experiment's folder is given."""
    folder = shutil.copytree(exported(), tmp_path / "model")
    (folder / "model_quantized.onnx").unlink()
    assert Classifier.load(folder).folder.precision == "fp32"
    with pytest.raises(ModelError, match=r"'int8' was asked for, but model_quantized.onnx is missing"):
        Classifier.load(folder, precision="int8")
    with pytest.raises(ModelError, match="no such file"):
        Classifier.load(folder / "other.onnx")
    for wrong, message in (
        ({"threads": 0}, "threads must be at least 1"),
        ({"batch_size": 0, "runtime": "auto"}, "batch_size must be at least 1"),
        ({"max_length": 0}, "max_length must be at least 3"),
        ({"precision": "INT8"}, "precision is one of auto, fp32, bf16, int8; got 'INT8'"),
        ({"runtime": "tensorrt"}, "runtime is one of auto, onnxruntime, openvino; got 'tensorrt'"),
    ):
        with pytest.raises(ModelError, match=message):
            Classifier.load(folder, **wrong)
    (folder / "model.onnx").rename(folder / "model_quantized.onnx")
    with pytest.raises(ModelError, match=r"no weights for the precision.*got config.json.*model_quantized.onnx"):
        Classifier.load(folder, precision="fp32")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer.json is missing"):
        Classifier.load(folder)
    student = shutil.copytree(classifier_folder(), tmp_path / "run" / "student")
    assert read_model_folder(tmp_path / "run").path == student
    edit_json(student / "config.json", kdlora_task=None)
    assert read_model_folder(student).texts is None
    (student / "model.safetensors").rename(student / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights.*got config.json, pytorch_model.bin, .*A pickle .* is not read"):
        Classifier.load(student)

    # A file that is not the one whose score was checked, and a label that no text can ever get.
    folder = shutil.copytree(exported(), tmp_path / "changed")
    with (folder / "model_quantized.onnx").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(ArtifactError, match=r"quantized\.onnx: not the file that was exported.*records sha256"):
        Classifier.load(folder)
    shutil.copy(exported() / "model_quantized.onnx", folder)
    edit_json(folder / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(ModelError, match=r"names 2 labels, so .* of shape \(1, 2\); got float32 of shape \(1, 3\)"):
        Classifier.load(folder, verify=False).predict(["a"])


@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_recovers_a_known_temperature(kind):
    """Prevents a fit that multiplies where it should divide, or that makes a model sure of all as 30 rows were easy."""
    draw = np.random.default_rng(0)
    logits = draw.normal(size=(20_000, 3))
    table = probabilities(logits, kind)
    if kind == "multi-label":
        labels = (draw.random(table.shape) < table).astype(int)
    else:
        labels = (draw.random((len(table), 1)) > table.cumsum(axis=1)).sum(axis=1)
    for factor in (0.4, 1.0, 3.0):
        found = fit_temperature(logits * factor, labels, kind)
        assert found.temperature == pytest.approx(factor, rel=0.05)
        assert found.nll_after <= found.nll_before + 1e-9
        assert found.ece_after < 0.02
    assert found.ece_before > 3 * found.ece_after
    wanted = np.eye(3, dtype=int)[np.arange(30) % 3]
    found = fit_temperature(wanted - 0.5, wanted if kind == "multi-label" else wanted.argmax(axis=1), kind)
    assert (found.temperature, found.nll_after) == (1.0, found.nll_before)


@pytest.mark.usefixtures("traced_once")
def test_saved_temperature_is_exported_and_applied(tmp_path, classifier_folder):
    """Prevents a calibrated student whose export is not calibrated."""
    folder = shutil.copytree(classifier_folder(), tmp_path / "model")
    save_temperature(folder, 2.5)
    result = export_onnx(folder, tmp_path / "out", formats=("onnx",))
    assert result.temperature == 2.5
    model = Classifier.load(tmp_path / "out")
    expected = probabilities(model.predict_logits(TEXTS[:1]), "single-label", 2.5)[0]
    assert list(model.predict(TEXTS[:1])[0].probabilities.values()) == pytest.approx(expected.tolist())


@pytest.mark.parametrize(
    ("logits", "labels", "kind", "message"),
    [
        (np.zeros((30, 1)), np.zeros(30), "regression", "nothing to calibrate"),
        (np.zeros((30, 2)), np.zeros(29, int), "single-label", r"labels of shape \(30,\)"),
        (np.zeros((30, 2)), np.full(30, -1), "single-label", "labels of 0 to 1, got -1"),
        (np.zeros((5, 2)), np.zeros(5, int), "single-label", "at least 20 validation rows"),
        (np.full((30, 2), np.nan), np.zeros(30, int), "single-label", "not finite"),
    ],
)
def test_what_cannot_be_calibrated(logits, labels, kind, message):
    """Prevents a temperature fitted on nonsense."""
    with pytest.raises(DataError, match=message):
        fit_temperature(logits, labels, kind)
