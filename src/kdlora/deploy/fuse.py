"""Fuse the captured graph: packed attention, layer norm, and the runtime's own optimisations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from transformers import PretrainedConfig

from kdlora.deploy.trace import ONE_OPERATOR_FAMILIES
from kdlora.errors import ModelError

_FUSED = ("Attention", "MultiHeadAttention", "BiasGelu", "Gelu", "LayerNormalization")

# Left out of the runtime's optimisations. On a CPU its fused residual and layer norm takes several times as long as
# an addition and a layer norm; a Gemm with its activation inside is not found by the quantiser; the NCHWc layout is
# for images and ties the file to one kind of processor.
_DISABLED = (
    "SkipLayerNormFusion",
    "EmbedLayerNormFusion",
    "GemmActivationFusion",
    "MatmulTransposeFusion",
    "NchwcTransformer",
)


def fuse(source: Path, to: Path, config: PretrainedConfig) -> dict[str, int]:
    """Optimise a captured graph and count what was fused."""
    model = ir.load(source)
    _name_dimensions(model.graph)
    for node in [node for node in model.graph if node.op_type == "MultiHeadAttention"]:
        _drop_reshapes(node)
        _pack(model.graph, node)
    RemoveUnusedNodesPass()(model)
    ir.save(model, to)
    optimise(to, to)
    found = Counter(node.op_type for node in ir.load(to).graph)
    layers = config.num_hidden_layers
    attention = layers if config.model_type in ONE_OPERATOR_FAMILIES else 0
    expected = {
        "attention": (attention, found["Attention"] + found["MultiHeadAttention"]),
        "GELU": (layers if _activation(config) == "gelu" else 0, found["BiasGelu"] + found["Gelu"]),
        "layer norm": (2 * layers - 1, found["LayerNormalization"]),
    }
    short = [f"{count} of {wanted} {name}" for name, (wanted, count) in expected.items() if count < wanted]
    if short:
        raise ModelError(
            f"graph optimisation found {' and '.join(short)} operators in {layers} layers; the installed torch or "
            "transformers writes this family in another way. Please report it with both versions."
        )
    return {name: found[name] for name in _FUSED}


def _activation(config: PretrainedConfig) -> str:
    """Name the activation of the feed-forward layers; families spell the setting in three ways."""
    names = ("hidden_act", "activation", "hidden_activation")
    return next((str(getattr(config, name)) for name in names if getattr(config, name, None)), "")


def optimise(source: Path, to: Path) -> None:
    """Let ONNX Runtime fold constants and fuse what stays portable, without the fusions that are slow on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    content = source.read_bytes()  # which may be the file that is written
    onnxruntime.InferenceSession(
        content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(_DISABLED)
    )


def _name_dimensions(graph: ir.Graph) -> None:
    """Name the free dimensions; the exporter gives each input numbered ones of its own."""
    for value in graph.inputs:
        value.shape = ir.Shape(["batch", "length"])
    for value in graph.outputs:
        value.shape = ir.Shape(["batch", *list(value.shape or ())[1:]])
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None


def _drop_reshapes(attention: ir.Node) -> None:
    """Undo the split into heads and back that transformers' interface makes and the operator does not need."""
    for position in range(3):
        value = attention.inputs[position]
        while value is not None and (reshape := _made_by(value, "Reshape")) is not None:
            value = reshape.inputs[0]
        # Two reshapes undo each other only where they start from a matrix product's (batch, length, width).
        if value is not None and _made_by(value, "Add", "MatMul") is not None:
            attention.replace_input_with(position, value)
    first = last = attention.outputs[0]
    while (after := _only_consumer(last)) is not None and after.op_type == "Reshape":
        last = after.outputs[0]
    if last is not first and after is not None and after.op_type == "MatMul":
        last.replace_all_uses_with(first)


def _made_by(value: ir.Value, *kinds: str) -> ir.Node | None:
    node = value.producer()
    return node if node is not None and node.op_type in kinds else None


def _only_consumer(value: ir.Value) -> ir.Node | None:
    readers = [usage.node for usage in value.uses()]
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


def _pack(graph: ir.Graph, attention: ir.Node) -> None:
    """Join the projections of query, key and value into one product, inside `Attention`.

    Only where they read the same input and nothing but padding is masked: the quantised form takes no bias.
    """
    inputs = [*attention.inputs, *[None] * 6]
    parts = [part for value in inputs[:3] if (part := _projection(value)) is not None]
    if inputs[5] is not None or len(parts) < 3 or len({id(part[0]) for part in parts}) > 1:
        return
    name = attention.outputs[0].name
    weight = add_weight(graph, f"{name}.qkv.weight", np.concatenate([part[1] for part in parts], axis=1))
    bias = add_weight(graph, f"{name}.qkv.bias", np.concatenate([part[2] for part in parts]))
    packed = ir.node(
        "Attention",
        [parts[0][0], weight, bias, inputs[4]],
        {key: attribute.value for key, attribute in attention.attributes.items()},
        domain="com.microsoft",
        name=f"Attention_{name}",
    )
    ir.convenience.replace_nodes_and_values(graph, attention, [attention], [packed], attention.outputs, packed.outputs)


def _projection(value: ir.Value | None) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """Take `x @ weight + bias` apart: (x, weight, bias)."""
    add = None if value is None else _made_by(value, "Add")
    if add is None:
        return None
    for product, other in (tuple(add.inputs), tuple(reversed(add.inputs))):
        node = None if product is None else _made_by(product, "MatMul")
        if node is None or node.inputs[0] is None:
            continue
        weight, bias = constant(node.inputs[1]), constant(other)
        if weight is not None and bias is not None and bias.ndim == 1:
            return node.inputs[0], weight, bias
    return None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Give a weight, or the value of a constant node."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_weight(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a weight."""
    value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
    graph.register_initializer(value)
    return value
