"""Fuse the captured graph: packed attention, biased GELU, layer norm, and the runtime's own optimisations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from kdlora.errors import ModelError

_MICROSOFT = "com.microsoft"
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


class Graph:
    """An ONNX graph with the look-ups that rewriting needs; rebuilt by `refresh` after a change."""

    def __init__(self, model: onnx.ModelProto) -> None:
        """Index a model."""
        self.model = model
        self.graph = model.graph
        self.refresh()

    def refresh(self) -> None:
        """Index the nodes again."""
        self.producers = {name: node for node in self.graph.node for name in node.output}
        self.weights = {tensor.name: tensor for tensor in self.graph.initializer}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def producer(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """Give the node that makes a value, if it is of one of the kinds."""
        node = self.producers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def only_consumer(self, name: str, *kinds: str) -> onnx.NodeProto | None:
        """Give the one node that reads a value, if it is of one of the kinds and no graph output reads it too."""
        nodes = self.consumers.get(name, [])
        is_output = any(value.name == name for value in self.graph.output)
        return nodes[0] if len(nodes) == 1 and not is_output and nodes[0].op_type in kinds else None

    def constant(self, name: str) -> np.ndarray | None:
        """Give the value of a weight or constant node."""
        if name in self.weights:
            return np.asarray(numpy_helper.to_array(self.weights[name]))
        node = self.producer(name, "Constant")
        if node is None or node.attribute[0].name != "value":
            return None
        return np.asarray(numpy_helper.to_array(node.attribute[0].t))

    def is_scalar(self, name: str, value: float) -> bool:
        """Say whether a value is this constant number."""
        array = self.constant(name)
        return array is not None and array.size == 1 and math.isclose(float(array.ravel()[0]), value, rel_tol=1e-5)

    def add_weight(self, name: str, array: np.ndarray) -> str:
        """Add a weight and give its name."""
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def replace(self, last: onnx.NodeProto, new: onnx.NodeProto) -> None:
        """Put a node that makes the same output in the place of another."""
        position = next(index for index, node in enumerate(self.graph.node) if node is last)
        self.graph.node.remove(last)
        self.graph.node.insert(position, new)
        self.refresh()

    def drop_unused(self) -> None:
        """Remove nodes and weights that nothing reads."""
        outputs = {value.name for value in self.graph.output}
        while True:
            read = outputs | {name for node in self.graph.node for name in node.input}
            idle = [node for node in self.graph.node if not any(name in read for name in node.output)]
            if not idle:
                break
            for node in idle:
                self.graph.node.remove(node)
        kept = [tensor for tensor in self.graph.initializer if tensor.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)
        self.refresh()


def fuse(source: Path, to: Path, *, layers: int, attention: bool, gelu: bool) -> dict[str, int]:
    """Optimise a captured graph and count what was fused."""
    graph = Graph(onnx.load(source))
    _name_dimensions(graph.model)
    _drop_reshapes_around_attention(graph)
    _pack_attention(graph)
    _fuse_gelu(graph)
    graph.drop_unused()
    onnx.save(graph.model, to)
    optimise(to, to)
    counts = count_fused(onnx.load(to, load_external_data=False))
    expected = {
        "attention": (layers if attention else 0, counts["Attention"] + counts["MultiHeadAttention"]),
        "GELU": (layers if gelu else 0, counts["BiasGelu"] + counts["Gelu"]),
        "layer norm": (2 * layers - 1, counts["LayerNormalization"]),
    }
    short = [f"{found} of {wanted} {name}" for name, (wanted, found) in expected.items() if found < wanted]
    if short:
        raise ModelError(
            f"graph optimisation found {' and '.join(short)} operators in {layers} layers; the installed torch or "
            "transformers writes this family in another way. Please report it with both versions."
        )
    return counts


def count_fused(model: onnx.ModelProto) -> dict[str, int]:
    """Count the fused operators of a graph."""
    found = Counter(node.op_type for node in model.graph.node)
    return {name: found[name] for name in _FUSED}


def optimise(source: Path, to: Path) -> None:
    """Let ONNX Runtime fold constants and fuse what stays portable, without the fusions that are slow on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    onnxruntime.InferenceSession(
        source.read_bytes() if source == to else str(source),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=list(_DISABLED),
    )


def _name_dimensions(model: onnx.ModelProto) -> None:
    """Name the free dimensions; the exporter gives each input numbered ones of its own."""
    for value in (*model.graph.input, *model.graph.output):
        names = ("batch", "length") if value.name != "logits" else ("batch",)
        for dimension, name in zip(value.type.tensor_type.shape.dim, names, strict=False):
            dimension.dim_param = name
    del model.graph.value_info[:]


def _attentions(graph: Graph) -> Iterator[onnx.NodeProto]:
    """Give the attention nodes; the list is taken before anything is changed."""
    yield from [node for node in graph.graph.node if node.op_type == "MultiHeadAttention"]


def _drop_reshapes_around_attention(graph: Graph) -> None:
    """Undo the split into heads and back that transformers' interface makes and the operator does not need."""
    for node in _attentions(graph):
        for position in range(3):
            name = node.input[position]
            while (reshape := graph.producer(name, "Reshape")) is not None:
                name = reshape.input[0]
            # Two reshapes undo each other only where they start from a matrix product's (batch, length, width).
            if graph.producer(name, "Add", "MatMul") is not None:
                node.input[position] = name
        last = node.output[0]
        while (reshape := graph.only_consumer(last, "Reshape")) is not None:
            last = reshape.output[0]
        if last != node.output[0] and graph.only_consumer(last, "MatMul") is not None:
            for consumer in graph.consumers[last]:
                consumer.input[:] = [node.output[0] if name == last else name for name in consumer.input]
        graph.refresh()


def _pack_attention(graph: Graph) -> None:
    """Join the projections of query, key and value into one product, inside `Attention`.

    Only where they read the same input and nothing but padding is masked: the quantised form takes no bias.
    """
    for node in _attentions(graph):
        if len(node.input) > 5 and node.input[5]:
            continue
        parts = [_projection(graph, name) for name in node.input[:3]]
        found = [part for part in parts if part is not None]
        if len(found) < 3 or len({part[0] for part in found}) != 1:
            continue
        name = node.output[0]
        weight = graph.add_weight(f"{name}.qkv.weight", np.concatenate([part[1] for part in found], axis=1))
        bias = graph.add_weight(f"{name}.qkv.bias", np.concatenate([part[2] for part in found]))
        packed = onnx.helper.make_node(
            "Attention",
            [found[0][0], weight, bias, *([node.input[4]] if len(node.input) > 4 else [])],
            [name],
            name=f"Attention_{name}",
            domain=_MICROSOFT,
        )
        packed.attribute.extend(node.attribute)
        graph.replace(node, packed)


def _projection(graph: Graph, name: str) -> tuple[str, np.ndarray, np.ndarray] | None:
    """Take `x @ weight + bias` apart: (x, weight, bias)."""
    add = graph.producer(name, "Add")
    if add is None:
        return None
    for product, other in (tuple(add.input), tuple(reversed(add.input))):
        node = graph.producer(product, "MatMul")
        bias = graph.constant(other)
        weight = graph.constant(node.input[1]) if node is not None else None
        if node is not None and weight is not None and bias is not None and bias.ndim == 1:
            return node.input[0], weight, bias
    return None


def _fuse_gelu(graph: Graph) -> None:
    """Replace the five nodes of an exact GELU together with the bias before it."""
    for node in [node for node in graph.graph.node if node.op_type == "Erf"]:
        found = _match_gelu(graph, node)
        if found is None:
            continue
        name, last = found
        add = graph.producer(name, "Add")
        biases = [] if add is None else [part for part in add.input if _is_vector(graph, part)]
        if add is not None and len(biases) == 1 and len(graph.consumers[name]) <= 2:
            value = next(part for part in add.input if part != biases[0])
            new = onnx.helper.make_node("BiasGelu", [value, biases[0]], [last.output[0]], domain=_MICROSOFT)
        else:
            new = onnx.helper.make_node("Gelu", [name], [last.output[0]], domain=_MICROSOFT)
        new.name = f"Gelu_{last.output[0]}"
        graph.replace(last, new)


def _is_vector(graph: Graph, name: str) -> bool:
    """Say whether a value is a constant vector, as a bias is."""
    array = graph.constant(name)
    return array is not None and array.ndim == 1 and array.size > 1


def _match_gelu(graph: Graph, erf: onnx.NodeProto) -> tuple[str, onnx.NodeProto] | None:
    """Match x * (0.5 * (1 + erf(x / sqrt 2))) in the orders that the exporter writes: (x, the last node)."""
    scaled = graph.producer(erf.input[0], "Div", "Mul")
    if scaled is None:
        return None
    factor = math.sqrt(2.0) if scaled.op_type == "Div" else math.sqrt(0.5)
    if not graph.is_scalar(scaled.input[1], factor):
        return None
    value = scaled.input[0]
    plus = graph.only_consumer(erf.output[0], "Add")
    if plus is None or not any(graph.is_scalar(name, 1.0) for name in plus.input):
        return None
    first = graph.only_consumer(plus.output[0], "Mul")
    second = graph.only_consumer(first.output[0], "Mul") if first is not None else None
    if first is None or second is None:
        return None
    others = {*first.input, *second.input} - {plus.output[0], first.output[0]}
    if value in others and any(graph.is_scalar(name, 0.5) for name in others - {value}):
        return value, second
    return None
