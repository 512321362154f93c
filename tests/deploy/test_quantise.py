"""Quantisation: embeddings by row, products left out, and the measurement of what is sensitive."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from deploy_folders import TEXTS
from kdlora.deploy.onnx_backend import open_session
from kdlora.deploy.predict import Classifier
from kdlora.deploy.quantise import BASE, Recipe, quantise, rank_products, recipes
from kdlora.system.ownership import mark_folder


def write_graph(file, node, given, name, weight):
    """Write a graph of one node with one weight."""
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", weight.shape[1]])
    graph = helper.make_graph([node], "one", [given], [out], [numpy_helper.from_array(weight, name)])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), file)


def products(model):
    """Names of the products of a graph that can be quantised."""
    return [node.name for node in model.graph.node if node.op_type in ("MatMul", "Attention")]


def test_rare_rows_keep_their_digits(tmp_path):
    """Prevents one large embedding from rounding a small one to nothing, as a scale for the whole table does."""
    table = np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32)
    table[1] *= 1e-3
    table[2] = 0
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch"])
    write_graph(tmp_path / "fp32.onnx", helper.make_node("Gather", ["table", "ids"], ["out"]), ids, "table", table)
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", BASE)
    found = open_session(tmp_path / "int8.onnx").run(None, {"ids": np.arange(64)})[0]
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


def test_excluded_products_store_their_weights_as_int8(tmp_path):
    """Prevents one sensitive product from making the file larger than its limit."""
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(64, 32)).astype(np.float32) * np.logspace(-3, 0, 32, dtype=np.float32)
    weight[:, 5] = 0
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    product = helper.make_node("MatMul", ["x", "w"], ["out"], name="product")
    write_graph(tmp_path / "fp32.onnx", product, rows, "w", weight)
    quantise(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", Recipe("", excluded=("product",)))
    stored = sum(numpy_helper.to_array(tensor).nbytes for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer)
    assert stored < weight.nbytes / 2
    # The identity reads the weights back; an activation far beyond the others would ruin them, were it rounded.
    rows = np.concatenate([np.eye(64, dtype=np.float32), np.full((1, 64), 1e4, np.float32)])
    found = open_session(tmp_path / "int8.onnx").run(None, {"x": rows})[0][:64]
    assert (np.abs(found - weight) <= np.abs(weight).max(axis=0) / 127).all()
    assert (found[:, 5] == 0).all()


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
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((exported() / name).read_bytes())
    onnx.save(model, tmp_path / "model.onnx")
    mark_folder(tmp_path, "export")
    ranked = rank_products(tmp_path / "model.onnx", Classifier.load(tmp_path), TEXTS)
    assert ranked[0] == victim.name
    assert sorted(ranked) == sorted(products(model))
    assert not (tmp_path / "switched.onnx").exists()
