"""Dynamic int8: weights per output channel, embeddings per row, and the remedies for a model that it harms."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from kdlora.deploy.encode import Text, TextEncoder, length_batches, spread
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.fuse import Graph, optimise
from kdlora.deploy.predict import BATCH_SIZE, BATCH_TOKENS, open_session
from kdlora.system.ownership import remove

_PRODUCTS = ("MatMul", "Attention")
"""Quantised operators. Pooler and head (Gemm) stay in fp32: under 1% of the weights, and the last to round."""
_LEAST_ROWS = 16
"""An embedding table of fewer rows (token types) is not worth a scale for each row."""


_ROWS = 128


@dataclass(frozen=True)
class Recipe:
    """One way to quantise.

    Attributes:
        name: what an export record calls it.
        signed: weights as int8; unsigned where False. On processors with VNNI or AMX, int8 is the fast one.
        reduce_range: 7-bit weights, for processors whose 8-bit products saturate.
        embeddings: quantise the embedding tables too.
        excluded: names of the products that multiply in fp32; of their weights too, only the int8 levels are stored.
    """

    name: str
    signed: bool = True
    reduce_range: bool = False
    embeddings: bool = True
    excluded: tuple[str, ...] = field(default=())


BASE = Recipe("int8 weights per channel, embeddings per row")


def recipes() -> Iterator[Recipe]:
    """Give the recipes that need no measurement, in the order in which they are tried."""
    yield BASE
    yield replace(BASE, name="uint8 weights", signed=False)
    yield replace(BASE, name="int8 weights of reduced range", reduce_range=True)
    yield replace(BASE, name="embeddings in fp32", embeddings=False)


def excluding(ranked: Sequence[str]) -> Iterator[Recipe]:
    """Give recipes that let ever more of the most sensitive products multiply in fp32, up to half of them."""
    count = 1
    while count <= max(1, len(ranked) // 2):
        noun = "product" if count == 1 else "products"
        yield replace(BASE, name=f"{count} most sensitive {noun} in fp32", excluded=tuple(ranked[:count]))
        count *= 2


def products(model: Path) -> list[str]:
    """List the names of the operators whose weights can be quantised, in the order of the graph."""
    graph = Graph(onnx.load(model))
    return [node.name for node in graph.graph.node if node.op_type in _PRODUCTS and node.input[1] in graph.weights]


def quantise(model: Path, to: Path, recipe: Recipe, *, only: str | None = None) -> None:
    """Quantise an optimised graph."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = Graph(onnx.load(model))
    if recipe.embeddings and only is None:
        _quantise_embeddings(graph)
    _store_as_levels(graph, recipe.excluded)
    chosen = [only] if only is not None else [n for n in products(model) if n not in recipe.excluded]
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it advises on the root logger to pre-process a graph that is optimised already
    try:
        quantize_dynamic(
            graph.model,
            to,
            op_types_to_quantize=list(_PRODUCTS),
            per_channel=True,
            reduce_range=recipe.reduce_range,
            weight_type=QuantType.QInt8 if recipe.signed else QuantType.QUInt8,
            nodes_to_quantize=chosen,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        root.setLevel(level)
    optimise(to, to)


def _quantise_embeddings(graph: Graph) -> None:
    """Store embedding tables as int8 with one scale a row.

    The quantiser's own form has one scale for a whole table, which its largest value decides: rows of rare words,
    with small values, would keep a few levels only.
    """
    for node in [node for node in graph.graph.node if node.op_type == "Gather"]:
        table = graph.constant(node.input[0]) if node.input[0] in graph.weights else None
        if table is None or table.ndim != 2 or table.dtype != np.float32 or len(table) < _LEAST_ROWS:
            continue
        if any(item.name == "axis" and item.i != 0 for item in node.attribute):
            continue
        prefix, output = node.input[0], node.output[0]
        rows, scales = _add_levels(graph, prefix, table, np.abs(table).max(axis=1, keepdims=True))
        make = onnx.helper.make_node
        parts = [
            make("Gather", [rows, node.input[1]], [f"{output}.int8"], name=f"{output}_rows"),
            make("Cast", [f"{output}.int8"], [f"{output}.levels"], name=f"{output}_levels", to=onnx.TensorProto.FLOAT),
            make("Gather", [scales, node.input[1]], [f"{output}.scale"], name=f"{output}_scales"),
        ]
        graph.replace(node, make("Mul", [f"{output}.levels", f"{output}.scale"], [output], name=f"{output}_scaled"))
        last = next(i for i, item in enumerate(graph.graph.node) if item.output[0] == output)
        for part in reversed(parts):
            graph.graph.node.insert(last, part)
        graph.refresh()
    graph.drop_unused()


def _store_as_levels(graph: Graph, names: Sequence[str]) -> None:
    """Store the weights of products that multiply in fp32 as int8 with one scale an output channel.

    It is the rounding of activations, one scale for a whole batch, that harms a product with outliers; its weights
    round as well as any, and would be four times as large.
    """
    for node in [node for node in graph.graph.node if node.name in names]:
        prefix = node.input[1]
        weight = graph.constant(prefix)
        if weight is None:
            continue
        levels, scales = _add_levels(graph, prefix, weight, np.abs(weight).max(axis=0))
        restore = onnx.helper.make_node(
            "DequantizeLinear", [levels, scales], [f"{prefix}.restored"], name=f"{prefix}_restored", axis=1
        )
        position = next(index for index, item in enumerate(graph.graph.node) if item is node)
        graph.graph.node.insert(position, restore)
        node.input[1] = f"{prefix}.restored"
        graph.refresh()
    graph.drop_unused()


def _add_levels(graph: Graph, prefix: str, values: np.ndarray, largest: np.ndarray) -> tuple[str, str]:
    """Add int8 levels and their scales, one for each of the largest magnitudes, which broadcast over the values."""
    scale = np.where(largest == 0, 1.0, largest / 127).astype(np.float32)
    levels = np.rint(values / scale).astype(np.int8)
    return graph.add_weight(f"{prefix}.int8", levels), graph.add_weight(f"{prefix}.scale", scale)


def rank_products(model: Path, folder: ModelFolder, texts: list[Text]) -> list[str]:
    """Order the products of a graph by what rounding each one's input does to the logits."""
    copy = model.with_name("switched.onnx")
    names = _add_rounding_switches(model, copy)
    session = open_session(copy, optimised=True)
    remove(copy)
    chosen = spread(texts, _ROWS)
    names_in = tuple(value.name for value in session.get_inputs() if value.name != "rounded")
    encoder = TextEncoder(replace(folder, path=model.parent), names_in)
    encodings = encoder.encode(chosen)
    batches = [
        encoder.pad([encodings[row] for row in rows])
        for rows in length_batches([len(encoding) for encoding in encodings], BATCH_SIZE, BATCH_TOKENS)
    ]

    def logits(rounded: np.ndarray) -> np.ndarray:
        return np.concatenate([session.run(None, {**batch, "rounded": rounded})[0] for batch in batches])

    exact = logits(np.zeros(len(names), dtype=bool))
    harm = [float(np.square(logits(switch) - exact).mean()) for switch in np.eye(len(names), dtype=bool)]
    return [names[number] for number in np.argsort(harm)[::-1]]


def _add_rounding_switches(model: Path, to: Path) -> list[str]:
    """Write a copy of a graph in which the input of each product can be rounded to 8 bits by a switch.

    The rounding of activations, one scale for a whole batch, is what harms a model; weights have a scale for each
    channel. So one session can tell how sensitive each product is, instead of one file for each.
    """
    names = products(model)
    graph = Graph(onnx.load(model))
    make = onnx.helper.make_node
    for number, name in enumerate(names):
        node = next(item for item in graph.graph.node if item.name == name)
        value, prefix = node.input[0], f"switch.{number}"
        index = graph.add_weight(f"{prefix}.index", np.array(number, dtype=np.int64))
        added = [
            make("DynamicQuantizeLinear", [value], [f"{prefix}.q", f"{prefix}.scale", f"{prefix}.zero"]),
            make("DequantizeLinear", [f"{prefix}.q", f"{prefix}.scale", f"{prefix}.zero"], [f"{prefix}.rounded"]),
            make("Gather", ["rounded", index], [f"{prefix}.on"]),
            make("Where", [f"{prefix}.on", f"{prefix}.rounded", value], [f"{prefix}.value"]),
        ]
        place = next(i for i, item in enumerate(graph.graph.node) if item is node or item.name == name)
        for part in reversed(added):
            graph.graph.node.insert(place, part)
        node.input[0] = f"{prefix}.value"
    graph.graph.input.append(onnx.helper.make_tensor_value_info("rounded", onnx.TensorProto.BOOL, [len(names)]))
    onnx.save(graph.model, to)
    return names
