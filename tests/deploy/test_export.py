"""The export chain: families, kinds, quantisation, gates that close, and refusals that leave nothing behind."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import transformers
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

import tiny
from deploy_folders import LONG, PAIRS, TEXTS
from experiments import edit_json
from kdlora.data.tags import Words, tag_names
from kdlora.data.tasks import Task
from kdlora.deploy import export as export_module
from kdlora.deploy import graph
from kdlora.deploy.export import ParityError, export_onnx, start_package
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.gates import Checks, Gate, LabelledTexts, measure_agreement
from kdlora.deploy.onnx_backend import OnnxBackend, open_session
from kdlora.deploy.predict import Classifier
from kdlora.deploy.quantise import BASE, Recipe, quantise, rank_products, recipes
from kdlora.errors import ArtifactError, ConfigError, DataError, ModelError

OTHER = Task("single-label", ("text",), ("label",), ("a", "b", "c"), ("accuracy",))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_keeps_its_logits_is_fused_and_gets_small(exported, classifier_folder, family):
    """Prevents a graph that is right only for the shapes, lengths, neighbours or padding of the traced example."""
    reference = Classifier.load(classifier_folder(family))
    shipped = Classifier.load(exported(family), precision="fp32")
    texts = [*TEXTS[:20], LONG, "a", "\u0301"]  # of the last one a tokenizer leaves nothing
    expected = reference.predict_logits(texts)
    np.testing.assert_allclose(shipped.predict_logits(texts), expected, atol=1e-4)
    for model in (shipped, reference):
        np.testing.assert_allclose(model.predict_logits(texts[-3:], batch_size=1), expected[-3:], atol=1e-4)
    np.testing.assert_allclose(shipped.predict_logits(PAIRS), reference.predict_logits(PAIRS), atol=1e-4)
    # A new torch or transformers would silently ship a graph in small pieces.
    fused = json.loads((exported(family) / "kdlora_export.json").read_text())["fused"]
    attention = fused["Attention"] + fused["MultiHeadAttention"]
    assert attention == (0 if family == "deberta-v2" else 2)
    assert fused["BiasGelu"] + fused["Gelu"] >= 2
    assert fused["LayerNormalization"] >= 3

    # An int8 file whose weights or embeddings were left in fp32, or whose outputs are noise.
    int8 = Classifier.load(exported(family), precision="int8").predict_logits(texts)
    assert np.corrcoef(expected.ravel(), int8.ravel())[0, 1] > 0.9
    weights = onnx.load(exported(family) / "model_quantized.onnx").graph.initializer
    assert {tensor.data_type for tensor in weights} & {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
    in_fp32 = [tensor for tensor in weights if tensor.data_type == onnx.TensorProto.FLOAT]
    assert max(np.prod(tensor.dims) for tensor in in_fp32) <= 32 * 64


def test_a_family_without_layer_norms_is_exported(exported, classifier_folder):
    """EuroBERT was refused for what it does not have, after all trainings."""
    expected = Classifier.load(classifier_folder("eurobert")).predict_logits(TEXTS)
    assert {file.name for file in exported("eurobert").glob("*.onnx")} == {"model.onnx", "model_quantized.onnx"}
    found = Classifier.load(exported("eurobert"), precision="fp32").predict_logits(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_folder_is_complete_and_names_no_place_of_this_machine(exported):
    """Prevents a model that needs preprocessing which was not shipped, or that optimum cannot find by name."""
    folder = exported()
    names = ["config.json", "kdlora_export.json", "model.onnx", "model_quantized.onnx"]
    assert sorted(entry.name for entry in folder.iterdir()) == [*names, "tokenizer.json", "tokenizer_config.json"]
    record = json.loads((folder / "kdlora_export.json").read_text())
    assert record["opset"] == graph.OPSET
    assert [stage["stage"] for stage in record["stages"]][:2] == ["onnx", "onnx-optimised"]
    assert record["stages"][2]["score"] is not None
    assert record["stages"][2]["drop_low"] <= record["stages"][2]["drop"] <= record["stages"][2]["drop_high"]
    config = json.loads((folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "neutral", "2": "positive"}
    model = onnx.load(folder / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import}[""] == record["opset"]
    dimensions = [[d.dim_param for d in value.type.tensor_type.shape.dim] for value in model.graph.input]
    assert dimensions == [["batch", "length"]] * 3

    # The exporter notes a stack trace at every node: a published model would tell whose machine made it, and where.
    files = sorted(exported().glob("*.onnx"))
    assert len(files) == 2
    for file in files:
        content = file.read_bytes()
        assert not [sign for sign in (b'.py", line', b"site-packages") if sign in content], file


@pytest.mark.usefixtures("traced_once")
def test_unreachable_gate_keeps_the_stages_before(tmp_path, classifier_folder, monkeypatch):
    """Prevents shipping an int8 file that failed, losing the fp32 one, or hiding the attempts; a check of few rows."""
    monkeypatch.setattr(
        export_module, "Gate", lambda **limits: Gate(**({**limits, "agreement": 1.1} if "drop" in limits else limits))
    )
    monkeypatch.setattr("kdlora.deploy.gates.ENOUGH_ROWS", 50)
    given = LabelledTexts(TEXTS[:5], [0] * 5)
    with pytest.raises(ParityError, match=r"int8 does not hold with any remedy.*of predictions agree") as caught:
        export_onnx(classifier_folder(), tmp_path / "out", texts=given, more_texts=TEXTS[5:])
    assert {stage.rows for stage in caught.value.result.stages} == {50}, "training rows fill up"
    shares = [(5 * one.unseen % 1, one.labelled) for one in caught.value.result.attempts]
    assert shares == [(0, 5)] * len(shares), "of the validation rows alone"
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert not (tmp_path / "out" / "model_quantized.onnx").exists()
    names = [attempt.stage for attempt in caught.value.result.attempts]
    plain = "int8 weights per channel, embeddings per row"
    remedies = [plain, "uint8 weights", "int8 weights of reduced range", "embeddings in fp32"]
    remedies += ["1 most sensitive product in fp32"]
    assert names[:5] == [f"onnx-int8 ({remedy})" for remedy in remedies]
    record = json.loads((tmp_path / "out" / "kdlora_export.json").read_text())
    assert len(record["attempts"]) == len(names)
    assert "does not hold" in record["failure"]
    assert Classifier.load(tmp_path / "out").predict(TEXTS[:1])


@pytest.mark.usefixtures("traced_once")
def test_large_logits_are_compared_by_their_size(tmp_path, classifier_folder, monkeypatch):
    """A good file was refused, and the libraries blamed, for the last digits of logits in the hundreds."""
    run, predict = OnnxBackend.run, Classifier.predict_logits
    scale = np.float32(1e4)
    monkeypatch.setattr(
        Classifier, "predict_logits", lambda self, *given, **more: predict(self, *given, **more) * scale
    )
    assert export_onnx(classifier_folder(), tmp_path / "out", texts=TEXTS, formats=("onnx",)).stages
    monkeypatch.setattr(OnnxBackend, "run", lambda self, inputs: run(self, inputs) * np.float32(1.0001))
    with pytest.raises(ModelError, match="logits differ by"):
        export_onnx(classifier_folder(), tmp_path / "wrong", texts=TEXTS, formats=("onnx",))


@pytest.mark.usefixtures("traced_once")
def test_wrong_graph_is_refused(tmp_path, classifier_folder, monkeypatch):
    """Prevents the known silent failure of ONNX exports: a file that loads and answers wrongly."""
    run = OnnxBackend.run
    monkeypatch.setattr(OnnxBackend, "run", lambda self, inputs: run(self, inputs) + np.float32(0.01))
    with pytest.raises(ModelError, match=r"does not reproduce the PyTorch model: logits differ by .*'bert'"):
        export_onnx(classifier_folder(), tmp_path / "out", texts=TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_unfused_graph_is_refused(tmp_path, exported):
    """Prevents a slow export that nobody notices."""
    config = transformers.AutoConfig.from_pretrained(exported(), num_hidden_layers=3)
    with pytest.raises(ModelError, match="2 of 3 attention and 2 of 3 GELU operators in 3 layers"):
        graph.fuse(exported() / "model.onnx", tmp_path / "fused.onnx", config)


def test_foreign_folder_is_not_replaced(tmp_path, classifier_folder):
    """Prevents `--to .` from deleting the user's files."""
    source, mine = shutil.copytree(classifier_folder(), tmp_path / "models" / "student"), tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    replaced = "would replace the model"
    refused = {mine: "not empty and holds no earlier export", source: replaced, source.parent: replaced}
    for target, told in refused.items():
        with pytest.raises(ArtifactError, match=told):
            export_onnx(source, target, texts=TEXTS)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"formats": ()}, ConfigError, "at least one format"),
        ({"max_metric_drop": -1}, ConfigError, "0 or more points"),
        ({"texts": ["good", " "]}, DataError, "validation text 1: the text is empty"),
        ({"min_agreement": 99}, ConfigError, "share between 0 and 1, got 99"),
        ({"texts": ()}, DataError, "must be checked on validation texts"),
        ({"texts": LabelledTexts(TEXTS, [7] * 60)}, DataError, "labels do not fit the single-label task"),
        ({"max_length": 2}, ModelError, "max_length must be at least 3"),
        ({"texts": LabelledTexts(TEXTS, None, OTHER)}, ModelError, r"'neutral', 'positive'\], but the task"),
    ],
)
def test_bad_settings_are_named(tmp_path, classifier_folder, settings, kind, message):
    """Prevents minutes of work before a mistake shows, and half-written folders after it."""
    with pytest.raises(kind, match=message):
        export_onnx(classifier_folder(), tmp_path / "out", **{"texts": TEXTS, **settings})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_classifier_is_refused(tmp_path, classifier_folder, exported, tiny_model_folder, monkeypatch):
    """Prevents exporting a random head, an adapter, or an export."""
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/base"}')
    headless = shutil.copytree(classifier_folder(), tmp_path / "headless")
    weights = {k: v for k, v in load_file(headless / "model.safetensors").items() if "classifier" not in k}
    save_file(weights, headless / "model.safetensors", {"format": "pt"})
    for folder, message in (
        (tmp_path / "nowhere", "no such folder"),
        (tmp_path, "not a model folder, config.json is missing"),
        (tiny_model_folder("bert"), "classification head.*got BertForPreTraining"),
        (exported(), "exported already"),
        (adapter, "an adapter of the base 'somewhere/base'. Merge it first"),
        (headless, r"lacks weights of the classifier \(classifier.bias, classifier.weight\)"),
    ):
        with pytest.raises(ModelError, match=message):
            export_onnx(folder, out, texts=TEXTS)
    monkeypatch.setattr(export_module, "_MOST_BYTES", 1000)  # beyond it PyTorch's second file was called a stranger's
    with pytest.raises(ModelError, match=r"GB of weights, and models above .* not exported"):
        export_onnx(classifier_folder(), out, texts=TEXTS)
    assert not out.exists()


def test_a_package_names_no_path_of_this_machine(classifier_folder, tmp_path):
    """A push left them out after they had been hashed, and nobody could load what was pushed."""
    folder = shutil.copytree(classifier_folder(), tmp_path / "student")
    edit_json(folder / "config.json", base_model_name_or_path="/data/models/bert")
    (tmp_path / "work").mkdir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    start_package(tmp_path / "work", read_model_folder(folder), tokenizer)
    assert json.loads((tmp_path / "work" / "config.json").read_text())["base_model_name_or_path"] == "bert"


def test_a_stage_without_finite_outputs_is_a_failed_attempt(exported, monkeypatch):
    """One recipe that gave NaN ended the whole export, fp32 and all, and named a folder that was gone."""
    file, attempts = exported() / "model.onnx", []

    def predict_logits(texts):
        raise ModelError(f"{file.parent}: the model's output for text 0 is not a finite number.")

    model = SimpleNamespace(open=lambda *_, **__: SimpleNamespace(predict_logits=predict_logits))
    monkeypatch.setattr("kdlora.deploy.gates.model_type", lambda _: model)
    at = {"folder": read_model_folder(exported()), "task": OTHER, "given": LabelledTexts(TEXTS), "texts": TEXTS}
    checks = SimpleNamespace(**at, stage="onnx", attempts=attempts)
    found = Checks.judge(checks, "onnx-int8", file, Gate())
    assert attempts == [found]
    assert (found.passed, found.reason) == (False, "the model's output for text 0 is not a finite number")


def compare(given, before, after, **limits):
    """Hold logits to those before them, which are all right."""
    at = {"task": given.task, "given": given, "logits": before, "score": 100.0}
    checks = SimpleNamespace(**at, stage="onnx", offsets=given.offsets, texts=given.texts)
    return Checks._compare(checks, "onnx-int8", after, Gate(**limits))


@pytest.mark.parametrize(
    ("metric", "counts", "flipped", "drop", "passes"),
    [
        ("accuracy", (40, 40, 40), 1, 0.5, True),
        ("accuracy", (40, 40, 40), 2, 0.5, False),
        ("accuracy", (40, 40, 40), 2, 4.0, True),
        ("accuracy", (40, 40, 40), 1, 0.0, False),
        ("macro_f1", (2, 1, 117), 1, 0.5, True),
        ("macro_f1", (2, 1, 117), 2, 0.5, False),
        ("macro_f1", (2, 1, 117), 1, 0.0, False),
        ("macro_f1", (1, 60, 59), 2, 0.6, True),
        ("macro_f1", (1, 60, 59), 3, 0.6, False),
    ],
)
def test_one_row_of_a_small_validation_set_may_change(metric, counts, flipped, drop, passes):
    """Prevents an int8 file that is refused for one row, of a rare class too, beside what it may lose; 0 stays 0."""
    labels = np.repeat(np.arange(3), counts)
    given = LabelledTexts(["a text"] * 120, labels, replace(OTHER, metrics=(metric,)))
    logits = np.eye(3, dtype=np.float32)[labels]
    after = logits.copy()
    after[:flipped] = after[-1]
    found = compare(given, logits, after, drop=drop)
    assert found.passed is passes, found.reason


@pytest.mark.parametrize(
    ("metric", "lost", "passes"),
    [("entity_f1", 1, True), ("entity_f1", 10, False), ("recall:EMAIL", 1, True), ("recall:EMAIL", 2, False)],
)
def test_one_entity_and_not_one_document_may_be_lost(metric, lost, passes):
    """Prevents an int8 file that lost 5 points of 20 documents as one row, or a refusal for one of 20 EMAIL."""
    task, text = Task("tokens", ("text",), ("tags",), tag_names(("PER", "EMAIL")), (metric,)), "Ada " * 25
    labels = np.repeat([3, 1], [20, 480])
    given = LabelledTexts([Words(text, range(0, 100, 4), range(3, 100, 4))] * 20, labels, task)
    logits = np.eye(5, dtype=np.float32)[labels]
    after = logits.copy()
    after[:lost] = np.eye(5)[0]
    found = compare(given, logits, after, drop=0.5)
    assert found.passed is passes, found.reason


@pytest.mark.parametrize(("changed", "least", "passes"), [(1, 0.99, True), (2, 0.99, False), (1, 1.0, False)])
@pytest.mark.parametrize("kind", ["single-label", "multi-label"])
def test_one_decision_of_few_may_differ(kind, changed, least, passes):
    """Prevents an int8 file that is refused for one of 30 answers; a share of 1 means all."""
    task = Task(kind, ("text",), ("label",), ("a", "b", "c"), ("macro_f1",))
    labels = np.arange(30) % 3
    logits = 2.0 * np.eye(3)[labels] - 1
    after = logits.copy()
    after[:changed] = np.roll(after[:changed], 1, axis=1) if kind == "single-label" else -1
    labels = labels if kind == "single-label" else logits > 0
    found = compare(LabelledTexts(["a text"] * 30, labels, task), logits, after, agreement=least)
    assert found.passed is passes, found.reason


def products(model):
    """Names of the products of a graph that can be quantised."""
    return [node.name for node in model.graph.node if node.op_type in ("MatMul", "Attention")]


def test_several_labels_agree_where_both_give_them():
    """Prevents a file that gives no label at all, and agrees in each of the cells that are empty in both."""
    names = tuple(map(str, range(150)))
    task = Task("multi-label", ("text",), ("labels",), names, ("micro_f1",))
    none = np.full((150, 150), -1.0)
    one = none + 2 * np.eye(150)
    some = np.where(np.arange(150)[:, None] < 30, none, one)
    found = [measure_agreement(task, *pair) for pair in ((one, one), (one, some), (one, none), (none, none))]
    assert found == [1.0, pytest.approx(2 * 120 / 270), 0.0, 1.0]


def test_several_labels_are_judged_by_their_threshold(exported, monkeypatch):
    """Prevents a file that agrees at 0.5, where few labels are said, and not at the fitted threshold."""
    task = Task("multi-label", ("text",), ("labels",), ("a", "b"), ("micro_f1",))
    before = np.tile([3.0, -0.9], (len(TEXTS), 1))
    exact, rounded = (SimpleNamespace(predict_logits=lambda _, logits=one: logits) for one in (before, before - 0.2))
    kind = Mock(return_value=exact, open=Mock(return_value=rounded))
    monkeypatch.setattr("kdlora.deploy.gates.model_type", lambda _: kind)
    for thresholds, passes in (({}, True), ({"a": 0.27, "b": 0.27}, False)):
        given = LabelledTexts(TEXTS, before > -1, task, thresholds=thresholds)
        checks = Checks(task, read_model_folder(exported()), None, given)
        found = checks.judge("onnx-int8", exported() / "model.onnx", Gate(agreement=0.99))
        assert found.passed is passes, found.reason


def test_rare_rows_keep_their_digits(tmp_path):
    """Prevents one large embedding from rounding a small one to nothing, as a scale for the whole table does."""
    table = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    table[1] *= 1e-3
    table[2] = 0
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 16])
    node = helper.make_node("Gather", ["table", "ids"], ["out"])
    made = helper.make_graph([node], "one", [ids], [out], [numpy_helper.from_array(table, "table")])
    made = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(made, tmp_path / "fp32.onnx")
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", BASE)
    found = open_session((tmp_path / "int8.onnx").read_bytes(), "int8").run(None, {"ids": np.arange(64)})[0]
    largest = np.abs(table).max(axis=1, keepdims=True)
    assert (np.abs(found - table) <= largest / 127).all()
    assert (found[2] == 0).all()


def test_excluded_products_multiply_in_fp32(tmp_path, exported):
    """Prevents a remedy that names products and rounds their activations all the same."""
    model = exported() / "model.onnx"
    names = products(onnx.load(model))
    assert len(names) == 2 * 4
    quantise(model, tmp_path / "some.onnx", Recipe("", excluded=tuple(names[:3])))
    quantise(model, tmp_path / "all.onnx", Recipe("", signed=False, embeddings=False))
    rounding = ("DynamicQuantizeMatMul", "MatMulInteger", "QAttention")
    counts = [
        sum(node.op_type in rounding for node in onnx.load(tmp_path / name).graph.node)
        for name in ("all.onnx", "some.onnx")
    ]
    assert counts == [8, 5]
    # The slow weight type is not to be shipped where the fast one was asked for.
    for name, wanted in (("all.onnx", TensorProto.UINT8), ("some.onnx", TensorProto.INT8)):
        weights = [tensor for tensor in onnx.load(tmp_path / name).graph.initializer if len(tensor.dims) == 2]
        assert {tensor.data_type for tensor in weights} & {TensorProto.INT8, TensorProto.UINT8} == {wanted}

    # "int8" that is fp32 in all but name.
    sizes = [len(recipe.excluded) for recipe in recipes(lambda: [f"p{number}" for number in range(24)])]
    assert sizes == [0, 0, 0, 0, 1, 2, 4, 8]
    assert len(list(recipes(lambda: ["only"]))[-1].excluded) == 1


def test_the_product_with_outliers_ranks_first(tmp_path, exported):
    """Prevents leaving out harmless products while the one that ruins the model is rounded."""
    model = onnx.load(exported() / "model.onnx")
    victim = [node for node in model.graph.node if node.op_type == "MatMul"][-1]
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    width = weights[victim.input[1]].dims[0]
    # One input far beyond the others, which its weights ignore: its scale leaves the others no levels.
    outlier = np.zeros(width, np.float32)
    outlier[0] = 3000
    weight = numpy_helper.to_array(weights[victim.input[1]]).copy()
    weight[0] = 0
    weights[victim.input[1]].CopyFrom(numpy_helper.from_array(weight, victim.input[1]))
    model.graph.initializer.append(numpy_helper.from_array(outlier, "outlier"))
    position = list(model.graph.node).index(victim)
    model.graph.node.insert(position, helper.make_node("Add", [victim.input[0], "outlier"], ["shifted"], name="shift"))
    victim = model.graph.node[position + 1]
    victim.input[0] = "shifted"
    onnx.save(model, tmp_path / "shifted.onnx")
    ranked = rank_products(tmp_path / "shifted.onnx", Classifier.load(exported()), TEXTS)
    assert ranked[0] == victim.name
    assert sorted(ranked) == sorted(products(model))
