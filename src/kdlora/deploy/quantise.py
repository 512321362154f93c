"""Dynamic int8: weights per output channel, embeddings per row, and the remedies for a model that it harms."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from kdlora.deploy.fuse import Graph, optimise

_PRODUCTS = ("MatMul", "Attention")
"""Quantised operators. Pooler and head (Gemm) stay in fp32: under 1% of the weights, and the last to round."""
_LEAST_ROWS = 16
"""An embedding table of fewer rows (token types) is not worth a scale for each row."""


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
    """Give recipes that let ever more of the most sensitive products multiply in fp32, up to half of them.

    Args:
        ranked: names of the products, the most sensitive first.
    """
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
    """Quantise an optimised graph.

    Args:
        model: fp32, as `fuse` wrote it.
        to: the quantised file, to be run as it is.
        recipe: what to quantise, and how.
        only: quantise this product and nothing else, to measure what it does.
    """
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
