"""Capture a transformers classifier as an ONNX graph, with attention as one operator where the family allows it."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.masking_utils import AttentionMaskInterface, bidirectional_mask_function, eager_mask
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from kdlora.errors import ModelError, first_line

OPSET = 18
"""Of the standard operators: the exporter's own."""
ONE_OPERATOR_FAMILIES = (
    "bert",
    "distilbert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "modernbert",
    "mpnet",
)
"""Families whose attention becomes one operator: through transformers' `AttentionInterface`, or MPNet's below.
DeBERTa's scores depend on position and content together; its attention stays in parts."""

_ATTENTION = "kdlora-onnx"


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
            program = torch.onnx.export(
                _Logits(model, names).eval(),
                tuple(arrays),
                dynamo=True,
                dynamic_shapes=(tuple(shape for _ in names),),
                input_names=list(names),
                output_names=["logits"],
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
        except Exception as error:
            raise ModelError(
                f"{type(model).__name__} cannot be exported to ONNX with opset {OPSET}: {first_line(error)} "
                f"(torch {torch.__version__})."
            ) from error
    if program is None:
        raise ModelError(f"{type(model).__name__}: the exporter gave no ONNX program.")
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
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
