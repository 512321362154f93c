"""The graph of a classifier: captured with attention as one operator where the family allows it, then fused."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from kdlora.errors import ModelError, first_line

OPSET = 18
"""Of the standard operators: the exporter's own."""
ONE_OPERATOR_FAMILIES = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "modernbert", "mpnet"}
"""Families whose attention becomes one operator: through transformers' `AttentionInterface`, or MPNet's below.
DeBERTa's scores depend on position and content together; its attention stays in parts."""

_ATTENTION = "kdlora-onnx"
_FUSED = ("Attention", "MultiHeadAttention", "BiasGelu", "Gelu", "LayerNormalization")

# Left out of the runtime's optimisations. On a CPU its fused residual and layer norm takes several times as long as
# an addition and a layer norm; a Gemm with its activation inside is not found by the quantiser; the NCHWc layout is
# for images and ties the file to one kind of processor.
_DISABLED = ["SkipLayerNormFusion", "EmbedLayerNormFusion", "GemmActivationFusion", "MatmulTransposeFusion"]
_DISABLED += ["NchwcTransformer"]


class _Logits(nn.Module):
    """A classifier of positional inputs that gives its logits alone, as a graph has them."""

    def __init__(self, model: PreTrainedModel, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *arrays: torch.Tensor) -> torch.Tensor:
        """Compute logits (batch, labels) of int64 arrays (batch, length)."""
        logits: torch.Tensor = self.model(**dict(zip(self.names, arrays, strict=True))).logits
        return logits


def capture(model: PreTrainedModel, names: Sequence[str], to: Path) -> None:
    """Export with dynamic batch and length."""
    example = torch.arange(3 * 7, dtype=torch.int64).reshape(3, 7) % model.config.vocab_size
    arrays = [example if name == "input_ids" else torch.ones_like(example) for name in names]
    if "token_type_ids" in names:
        arrays[names.index("token_type_ids")] = torch.zeros_like(example)
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _single_operators(model), quiet("torch.onnx", "onnxscript", "onnx_ir", "torch.export"):
        try:
            program = cast(
                "torch.onnx.ONNXProgram",
                torch.onnx.export(
                    _Logits(model, names).eval(),
                    tuple(arrays),
                    dynamo=True,
                    dynamic_shapes=(tuple(shape for _ in names),),
                    input_names=list(names),
                    output_names=["logits"],
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                ),
            )
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be exported to ONNX with opset {OPSET}: {first_line(error)} "
                f"(torch {torch.__version__})."
            ) from error
    # The exporter notes a stack trace at every node: paths of this machine, which differ elsewhere.
    ClearMetadataAndDocStringPass()(program.model)
    for node in program.model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    program.save(str(to))


@contextlib.contextmanager
def _single_operators(model: PreTrainedModel) -> Iterator[None]:
    """Let attention and GELU write one node each; families with attention of their own keep it."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    before = model.config._attn_implementation
    replaced: list[nn.Module] = []
    try:
        if model.config.model_type in ONE_OPERATOR_FAMILIES:
            model.config._attn_implementation = _ATTENTION
        for module in model.modules():
            if isinstance(module, GELUActivation | MPNetSelfAttention):
                module.forward = _gelu if isinstance(module, GELUActivation) else _mpnet_forward(module)
                replaced.append(module)
        yield
    finally:
        model.config._attn_implementation = before
        for module in replaced:
            del module.forward


def _gelu(value: torch.Tensor) -> torch.Tensor:
    """Write the node of an exact GELU, which the runtime fuses with the bias before it."""
    return torch.onnx.ops.symbolic("com.microsoft::Gelu", [value], dtype=value.dtype, shape=value.shape, version=1)


def _mask(**arguments: Any) -> torch.Tensor | None:
    """Pass the padding mask on as it is; any other pattern (ModernBERT's window) becomes an additive mask.

    The arguments are those of transformers' mask functions.
    """
    if arguments["mask_function"] is bidirectional_mask_function:
        padding: torch.Tensor | None = arguments["attention_mask"]
        return padding
    pattern: torch.Tensor = eager_mask(**arguments)
    return pattern


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Stand for attention in a capture: transformers' signature, (batch, heads, length, width) in."""
    del module, unused
    heads, width = query.shape[1], query.shape[3]
    arrays = [array.transpose(1, 2).flatten(2) for array in (query, key, value)]
    is_padding = attention_mask is not None and attention_mask.dim() == 2
    padding, bias = (attention_mask, None) if is_padding else (None, attention_mask)
    output = _operator(arrays, padding, bias, heads, width**-0.5 if scaling is None else scaling)
    return output.unflatten(2, (heads, width)), None


def _operator(
    arrays: Sequence[torch.Tensor], padding: torch.Tensor | None, bias: torch.Tensor | None, heads: int, scale: float
) -> torch.Tensor:
    """Write the node for query, key and value (batch, length, heads * width).

    `padding` (batch, length) is 0 where a token is padding; `bias` (1 or batch, 1 or heads, length, length) is
    added to the scores.
    """
    query = arrays[0]
    return torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        [*arrays, None, None if padding is None else padding.to(torch.int32), bias],
        {"num_heads": heads, "scale": scale, "mask_filter_value": torch.finfo(torch.float32).min},
        dtype=query.dtype,
        shape=query.shape,
        version=1,
    )


def _mpnet_forward(module: MPNetSelfAttention) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Make MPNet's attention, whose scores get a position bias, write the same node."""

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **unused: Any,
    ) -> tuple[torch.Tensor, ...]:
        del unused
        # The bias is the same for every row; the model repeats it, the operator broadcasts it.
        bias = None if position_bias is None else position_bias[:1]
        arrays = [layer(hidden_states) for layer in (module.q, module.k, module.v)]
        scale = module.attention_head_size**-0.5
        return (module.o(_operator(arrays, attention_mask, bias, module.num_attention_heads, scale)),)

    return forward


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence what libraries remark on their own internals, by the names of their loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


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
    spellings = ("hidden_act", "activation", "hidden_activation")  # of the feed-forward layers' activation
    activation = next((getattr(config, name) for name in spellings if getattr(config, name, None)), "")
    is_one = config.model_type in ONE_OPERATOR_FAMILIES
    expected = {
        "attention": (layers if is_one else 0, found["Attention"] + found["MultiHeadAttention"]),
        "GELU": (layers if activation == "gelu" else 0, found["BiasGelu"] + found["Gelu"]),
        "layer norm": (2 * layers - 1, found["LayerNormalization"]),
    }
    short = [f"{count} of {wanted} {name}" for name, (wanted, count) in expected.items() if count < wanted]
    if short:
        raise ModelError(
            f"graph optimisation found {' and '.join(short)} operators in {layers} layers; the installed torch or "
            "transformers writes this family in another way. Please report it with both versions."
        )
    return {name: found[name] for name in _FUSED}


def optimise(source: Path, to: Path) -> None:
    """Let ONNX Runtime fold constants and fuse what stays portable, without the fusions that are slow on a CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(to)
    content = source.read_bytes()  # which may be the file that is written
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"], disabled_optimizers=_DISABLED)


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
