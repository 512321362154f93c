"""Number formats: which one the machine is good at, and a frozen base that is cast once."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from kdlora.errors import ConfigError, did_you_mean

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str) -> torch.device:
    """Choose where to compute.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`.

    Raises:
        ConfigError: an unknown name, or `cuda` without a CUDA device.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"run.device is one of auto, cpu, cuda; got {device!r}." + did_you_mean(device, ["auto", "cpu", "cuda"])
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but PyTorch finds no CUDA device here; use auto or cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def resolve_precision(precision: str, device: str) -> tuple[str, str]:
    """Choose the number format of the matrix products.

    Args:
        precision: `auto`, `fp32`, `bf16` or `fp16`.
        device: `auto`, `cpu` or `cuda`.

    Returns:
        `fp32`, `bf16` or `fp16`, and the reason in plain words.

    Raises:
        ConfigError: an unknown name, fp16 on a CPU, or no such device.
    """
    names = ["auto", *DTYPES]
    if precision not in names:
        raise ConfigError(
            f"run.precision is one of {', '.join(names)}; got {precision!r}." + did_you_mean(precision, names)
        )
    place = resolve_device(device)
    if precision == "auto":
        return _best_on_cuda() if place.type == "cuda" else _best_on_cpu()
    if precision == "fp16" and place.type == "cpu":
        raise ConfigError("run.precision is fp16, which is for CUDA devices; on a CPU use auto, bf16 or fp32")
    slow = precision == "bf16" and (_best_on_cuda() if place.type == "cuda" else _best_on_cpu())[0] != "bf16"
    return precision, "as set" + (", though this machine emulates bf16, which is slow" if slow else "")


def _best_on_cuda() -> tuple[str, str]:
    name = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability() >= (8, 0):
        return "bf16", f"{name} has native bf16 products"
    return "fp16", f"{name} has no native bf16 products, so fp16 with loss scaling"


def _best_on_cpu() -> tuple[str, str]:
    feature = _bf16_matrix_unit()
    if feature:
        return "bf16", f"the CPU has matrix units for bf16 ({feature})"
    return "fp32", "the CPU has no matrix units for bf16"


def _bf16_matrix_unit() -> str:
    """Name the instruction set whose bf16 products are faster than fp32's, or return an empty string.

    AVX-512's bf16 dot product is not one: on a Xeon without AMX, oneDNN's products with it run at half the speed of
    fp32 (`benchmarks/README.md`). oneDNN's own check is no help: it says yes even where it merely emulates.
    """
    flags = _cpu_flags()
    return next((flag for flag in ("amx_bf16", "bf16") if flag in flags), "")


def _cpu_flags() -> frozenset[str]:
    """Read what the processor can do, from PyTorch or, failing that, from Linux."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return frozenset(name for name, value in capabilities.items() if value is True)
    if platform.system() != "Linux":
        return frozenset()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    words = next((line.split(":", 1)[1] for line in lines if line.lower().startswith(("flags", "features"))), "")
    return frozenset(words.split())


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Give the context in which a forward pass multiplies in `precision`; nothing for fp32.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
        device: where the model lies.
    """
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


@contextlib.contextmanager
def frozen_in_half(model: nn.Module, precision: str) -> Iterator[int]:
    """Hold the frozen linear layers in half precision while a training runs; the originals come back on exit.

    Autocast casts every weight again in every step; a frozen weight gives the same result each time. Only layers
    that autocast would cast are touched: adapters, fresh modules, embeddings and norms stay in fp32, so the
    numbers are those of plain autocast. What comes back is the very tensor that was there, so an adapter is
    merged into the unrounded base. Layers under DoRA are left alone, whose norm is taken over the base weight.

    Args:
        model: any model; inside the context it must run under `autocast`.
        precision: `bf16` or `fp16`; with `fp32` nothing is done.

    Yields:
        The number of layers that were cast.
    """
    originals: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        layers = [] if precision == "fp32" else _frozen_linear_layers(model)
        for layer in layers:
            for parameter in layer.parameters(recurse=False):
                originals.append((parameter, parameter.data))
                parameter.data = parameter.data.to(DTYPES[precision])
        yield len(layers)
    finally:
        for parameter, original in originals:
            parameter.data = original.to(parameter.device)


def _frozen_linear_layers(model: nn.Module) -> list[nn.Linear]:
    """List plain linear layers without a trainable or shared parameter."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    dora = {name for name, module in model.named_modules() if any(getattr(module, "use_dora", {}).values())}
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.rpartition(".")[0] not in dora
        and all(not p.requires_grad and owners[id(p)] == 1 for p in module.parameters(recurse=False))
        and module.weight.dtype == torch.float32
    ]
