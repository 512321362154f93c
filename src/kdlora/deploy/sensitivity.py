"""Measure which products of a graph suffer from 8-bit activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from kdlora.deploy.encode import Text, TextEncoder, length_batches, spread
from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.fuse import Graph
from kdlora.deploy.predict import BATCH_SIZE, BATCH_TOKENS, open_session
from kdlora.deploy.quantise import products

_ROWS = 128


def rank_products(model: Path, folder: ModelFolder, texts: list[Text]) -> list[str]:
    """Order the products of a graph by what rounding each one's input does to the logits.

    Args:
        model: fp32, as `fuse` wrote it; a copy is written beside it and removed.
        folder: describes the model; the tokenizer beside `model` is used.
        texts: at least one; 128 of them, evenly spaced, are used.

    Returns:
        Names of the products, the most sensitive first.
    """
    copy = model.with_name("switched.onnx")
    names = _add_rounding_switches(model, copy)
    session = open_session(copy, optimised=True)
    copy.unlink()
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

    Args:
        model: fp32, as `fuse` wrote it.
        to: the copy; it has a further input `rounded`, bool (products,).

    Returns:
        The names of the products, in the order of the switches.
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
