"""Dynamic int8: weights per output channel, embeddings per row, and the remedies for a model that it harms.

OpenVINO has static int8: the scales of activations from texts of the task, and their outliers moved into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kdlora.data.tags import Words
from kdlora.deploy.graph import optimise, quiet
from kdlora.deploy.network import spread
from kdlora.deploy.onnx_backend import open_session
from kdlora.deploy.predict import Text
from kdlora.deploy.tagger import Model

_PRODUCTS = ("MatMul", "Attention")
"""Quantised operators. Pooler and head (Gemm) stay in fp32: under 1% of the weights, and the last to round. The head of
a tagger is a MatMul; in int8 its answers were the same."""
_LEAST_ROWS = 16
"""An embedding table of fewer rows (token types) is not worth a scale for each row."""
_ROWS = 128
"""Texts on which the sensitivity of products is measured."""


@dataclass(frozen=True)
class Recipe:
    """One way to quantise; its name stands in the record of an export."""

    name: str
    signed: bool = True  # weights as int8, else as uint8; on processors with VNNI or AMX, int8 is the fast one
    reduce_range: bool = False  # 7-bit weights, for processors whose 8-bit products saturate
    embeddings: bool = True  # quantise the embedding tables too
    excluded: tuple[str, ...] = ()  # products that multiply in fp32; of their weights only int8 levels are stored


BASE = Recipe("int8 weights per channel, embeddings per row")
STATIC = "static int8 with smoothed activations"
"""The one recipe for OpenVINO."""


def recipes(rank: Callable[[], Sequence[str]]) -> Iterator[Recipe]:
    """Give the recipes in their order; `rank`, which names the most sensitive products, is called for the last ones."""
    yield BASE
    yield replace(BASE, name="uint8 weights", signed=False)
    yield replace(BASE, name="int8 weights of reduced range", reduce_range=True)
    yield replace(BASE, name="embeddings in fp32", embeddings=False)
    ranked = rank()
    count = 1
    while count <= max(1, len(ranked) // 2):
        noun = "product" if count == 1 else "products"
        yield replace(BASE, name=f"{count} most sensitive {noun} in fp32", excluded=tuple(ranked[:count]))
        count *= 2


def _products(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type in _PRODUCTS and _weight(node.inputs[1]) is not None]


def _weight(value: ir.Value | None) -> np.ndarray | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def quantise(source: Path, to: Path, recipe: Recipe) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = ir.load(source)
    chosen = [str(node.name) for node in _products(model.graph) if node.name not in recipe.excluded]
    if recipe.embeddings:
        _quantise_embeddings(model.graph)
    _store_as_levels(model.graph, recipe.excluded)
    RemoveUnusedNodesPass()(model)
    # The quantiser turns some weights round, and does not correct a shape that is noted beside them.
    for value in model.graph.initializers.values():
        value.shape = None
    with quiet("root"):  # it advises to pre-process a graph that is optimised already
        quantize_dynamic(
            ir.to_proto(model),
            to,
            op_types_to_quantize=list(_PRODUCTS),
            per_channel=True,
            reduce_range=recipe.reduce_range,
            weight_type=QuantType.QInt8 if recipe.signed else QuantType.QUInt8,
            nodes_to_quantize=chosen,
            extra_options={"DefaultTensorType": ir.DataType.FLOAT.value},
        )
    optimise(to, to)


def _quantise_embeddings(graph: ir.Graph) -> None:
    """Store embedding tables as int8 with one scale a row; of one for all, rare words with small values keep little."""
    for node in [node for node in graph if node.op_type == "Gather"]:
        table = _weight(node.inputs[0])
        if table is None or table.ndim != 2 or table.dtype != np.float32 or len(table) < _LEAST_ROWS:
            continue
        if "axis" in node.attributes and node.attributes["axis"].value != 0:
            continue
        rows, scales = _add_levels(graph, f"{node.name}.table", table, np.abs(table).max(axis=1, keepdims=True))
        gather = ir.node("Gather", [rows, node.inputs[1]])
        cast = ir.node("Cast", gather.outputs, {"to": ir.DataType.FLOAT})
        scale = ir.node("Gather", [scales, node.inputs[1]])
        scaled = ir.node("Mul", [cast.outputs[0], scale.outputs[0]])
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], [gather, cast, scale, scaled], node.outputs, scaled.outputs
        )


def _store_as_levels(graph: ir.Graph, names: Sequence[str]) -> None:
    """Store as int8 the weights of products that multiply in fp32: only the rounding of activations harms these."""
    for node in [node for node in graph if node.name in names]:
        if (weight := _weight(node.inputs[1])) is not None:
            levels, scales = _add_levels(graph, f"{node.name}.weight", weight, np.abs(weight).max(axis=0))
            restored = ir.node("DequantizeLinear", [levels, scales], {"axis": 1})
            graph.insert_before(node, restored)
            node.replace_input_with(1, restored.outputs[0])


def _add_levels(graph: ir.Graph, name: str, values: np.ndarray, largest: np.ndarray) -> tuple[ir.Value, ir.Value]:
    """Add int8 levels and their scales, one for each of the largest magnitudes, which broadcast over the values."""
    scale = np.where(largest == 0, 1.0, largest / 127).astype(np.float32)
    levels = np.rint(values / scale).astype(np.int8)
    return _add_weight(graph, f"{name}.int8", levels), _add_weight(graph, f"{name}.scale", scale)


def _add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value


def rank_products(file: Path, served: Model, texts: Sequence[Text | Words]) -> list[str]:
    """Order the products of a graph by what rounding each one's input does to the logits."""
    model = ir.load(file)
    names = _add_rounding_switches(model.graph)
    session = open_session(ir.to_proto(model).SerializeToString(), f"{file} with switches", optimised=True)
    batches = [*served.batches(spread(texts, _ROWS))]

    def logits(rounded: np.ndarray) -> np.ndarray:
        outputs = (session.run(None, {**batch, "rounded": rounded})[0] for batch in batches)
        return np.concatenate([output.reshape(-1, output.shape[-1]) for output in outputs])

    exact = logits(np.zeros(len(names), dtype=bool))
    harm = [float(np.square(logits(switch) - exact).mean()) for switch in np.eye(len(names), dtype=bool)]
    return [names[number] for number in np.argsort(harm)[::-1]]


def _add_rounding_switches(graph: ir.Graph) -> list[str]:
    """Let a switch round the input of each product, so that one session tells what each costs; name the products."""
    nodes = _products(graph)
    switches = ir.val("rounded", ir.DataType.BOOL, [len(nodes)])
    graph.inputs.append(switches)
    for number, node in enumerate(nodes):
        value = node.inputs[0]
        index = _add_weight(graph, f"switch.{number}.index", np.array(number, dtype=np.int64))
        levels = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
        rounded = ir.node("DequantizeLinear", levels.outputs)
        switch = ir.node("Gather", [switches, index])
        chosen = ir.node("Where", [switch.outputs[0], rounded.outputs[0], value])
        graph.insert_before(node, [levels, rounded, switch, chosen])
        node.replace_input_with(0, chosen.outputs[0])
    return [str(node.name) for node in nodes]


def quantise_statically(source: Path, to: Path, served: Model, texts: Sequence[Text | Words]) -> None:
    """Write a graph in int8 for OpenVINO."""
    from kdlora.deploy.openvino_backend import import_untracked, openvino

    nncf = import_untracked("nncf")
    rows = [arrays for text in texts for arrays in served.batches([text])]
    model, kind = openvino.Core().read_model(source), nncf.ModelType.TRANSFORMER
    with quiet("nncf"):
        found = nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows))
    openvino.save_model(found, to, compress_to_fp16=False)
