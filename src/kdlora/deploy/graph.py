"""The graph of a classifier: captured with attention as one operator where the family allows it, then optimised."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask

from kdlora.errors import ModelError, first_line

OPSET = 18
"""Of the standard operators: the exporter's own."""
ONE_OPERATOR_FAMILIES = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "modernbert", "mpnet"}
"""Families whose attention becomes one operator, projections included, or (ModernBERT) by `AttentionInterface`.
DeBERTa's scores depend on position and content together; its attention stays in parts."""

_ATTENTION = "kdlora-onnx"
_PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"))
"""Names of the three layers that an attention module begins with, where it has them; ModernBERT's go another way."""
_FUSED = ("Attention", "MultiHeadAttention", "BiasGelu", "Gelu", "LayerNormalization")

# Left out of the runtime's optimisations. On a CPU its fused residual and layer norm takes several times as long as
# an addition and a layer norm; a Gemm with its activation inside is not found by the quantiser; the NCHWc layout is
# for images and ties the file to one kind of processor.
_DISABLED = ["SkipLayerNormFusion", "EmbedLayerNormFusion", "GemmActivationFusion", "MatmulTransposeFusion"]
_DISABLED += ["NchwcTransformer"]


def capture(model: PreTrainedModel, names: Sequence[str], to: Path) -> None:
    """Export with dynamic batch and length."""
    example = torch.arange(3 * 7, dtype=torch.int64).reshape(3, 7) % model.config.vocab_size
    examples = {"input_ids": example, "attention_mask": torch.ones_like(example)}
    arrays = {name: examples.get(name, torch.zeros_like(example)) for name in names}
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _single_operators(model), quiet("torch.onnx", "onnxscript", "onnx_ir", "torch.export"):
        try:
            program = cast(
                "torch.onnx.ONNXProgram",
                torch.onnx.export(
                    model,
                    kwargs=arrays,
                    dynamo=True,
                    dynamic_shapes=dict.fromkeys(names, shape),
                    input_names=list(names),
                    output_names=["logits"],
                    opset_version=OPSET,
                    external_data=False,
                    verbose=False,
                ),
            )
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            raise ModelError(
                f"{type(model).__name__} cannot be exported to ONNX with opset {OPSET}: {reason} (torch "
                f"{torch.__version__})."
            ) from error
    # The exporter notes a stack trace at every node: paths of this machine, which differ elsewhere.
    ClearMetadataAndDocStringPass()(program.model)
    graph = program.model.graph
    # It gives each input free dimensions of its own.
    for value in graph.inputs:
        value.shape = ir.Shape(["batch", "length"])
    for value in graph.outputs:
        sizes = list(value.shape or ())
        value.shape = ir.Shape(["batch", *["length"] * (len(sizes) - 2), sizes[-1]])
    for value in (value for node in graph for value in node.outputs):
        value.metadata_props.clear()
        if not value.is_graph_output():
            value.type = value.shape = None
    program.save(str(to))


@contextlib.contextmanager
def _single_operators(model: PreTrainedModel) -> Iterator[None]:
    """Let attention and GELU write one node each; families with attention of their own keep it."""
    AttentionInterface.register(_ATTENTION, _attention)
    AttentionMaskInterface.register(_ATTENTION, _mask)
    before, is_one = model.config._attn_implementation, model.config.model_type in ONE_OPERATOR_FAMILIES
    replaced: list[nn.Module] = []
    try:
        if is_one:
            model.config._attn_implementation = _ATTENTION
        for module in model.modules():
            found = (names for names in _PROJECTIONS if is_one and all(hasattr(module, name) for name in names))
            if (names := next(found, None)) is not None:
                module.forward = _attention_forward(module, names, model.config.num_attention_heads)
            elif isinstance(module, GELUActivation):
                module.forward = _gelu
            else:
                continue
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
    """Pass the padding mask on as it is; any other pattern (ModernBERT's window) becomes an additive mask."""
    if arguments["mask_function"] is bidirectional_mask_function:
        padding: torch.Tensor | None = arguments["attention_mask"]
        return padding
    pattern: torch.Tensor = eager_mask(**arguments)
    return pattern


def _attention(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Stand for attention in a capture: transformers' signature, (batch, heads, length, width) in."""
    arrays = [array.transpose(1, 2).flatten(2) for array in (query, key, value)]
    is_padding = attention_mask is not None and attention_mask.dim() == 2
    padding, bias = (attention_mask, None) if is_padding else (None, attention_mask)
    # Not split into heads again, since the caller joins them.
    return _operator(arrays, padding, bias, query.shape[1], scaling), None


def _operator(
    arrays: Sequence[torch.Tensor],
    padding: torch.Tensor | None,
    bias: torch.Tensor | None,
    heads: int,
    scale: float,
    *,
    packed: bool = False,
) -> torch.Tensor:
    """Write the node for query, key and value (batch, length, width), or for hidden states and packed projections.

    `padding` (batch, length) is 0 where a token is padding; `bias` (1 or batch, 1 or heads, length, length) is
    added to the scores.
    """
    mask = None if padding is None else padding.to(torch.int32)
    return torch.onnx.ops.symbolic(
        "com.microsoft::Attention" if packed else "com.microsoft::MultiHeadAttention",
        [*arrays, mask] if packed else [*arrays, None, mask, bias],
        {"num_heads": heads, "scale": scale, "mask_filter_value": torch.finfo(torch.float32).min},
        dtype=arrays[0].dtype,
        shape=arrays[0].shape,
        version=1,
    )


def _attention_forward(module: nn.Module, names: Sequence[str], heads: int) -> Callable[..., tuple[torch.Tensor, None]]:
    """Make attention of hidden states (batch, length, width) write one node, its three projections included."""
    layers = [getattr(module, name) for name in names]
    last = next((getattr(module, name) for name in ("o", "out_lin") if hasattr(module, name)), nn.Identity())
    scale = (layers[0].out_features // heads) ** -0.5

    def forward(
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **_unused: Any,
    ) -> tuple[torch.Tensor, None]:
        if position_bias is None:
            weight = torch.cat([layer.weight.T for layer in layers], dim=1)
            arrays = [hidden_states, weight, torch.cat([layer.bias for layer in layers])]
            return last(_operator(arrays, attention_mask, None, heads, scale, packed=True)), None
        # Not packed: the quantised form takes no bias. It is the same for every row; the operator broadcasts it.
        arrays = [layer(hidden_states) for layer in layers]
        return last(_operator(arrays, attention_mask, position_bias[:1], heads, scale)), None

    return forward


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Silence what libraries remark on their own internals, by the names of their loggers."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        with warnings.catch_warnings(action="ignore"):
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fuse(source: Path, to: Path, config: PretrainedConfig) -> dict[str, int]:
    """Optimise a captured graph and count what was fused."""
    optimise(source, to)
    found = Counter(node.op_type for node in ir.load(to).graph)
    layers = config.num_hidden_layers
    spellings = ("hidden_act", "activation", "hidden_activation")  # of the feed-forward layers' activation
    activation = next((getattr(config, name) for name in spellings if getattr(config, name, None)), "")
    is_one = config.model_type in ONE_OPERATOR_FAMILIES
    expected = {
        "attention": (layers if is_one else 0, found["Attention"] + found["MultiHeadAttention"]),
        "GELU": (layers if activation == "gelu" else 0, found["BiasGelu"] + found["Gelu"]),
        "layer norm": (2 * layers - 1 if is_one else 0, found["LayerNormalization"]),  # others may have another norm
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
