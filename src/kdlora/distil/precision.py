"""How a model is at work: number formats and a base cast once, dropout, recomputed activations, memory that is kept."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from kdlora.errors import ConfigError, ModelError, did_you_mean, first_line
from kdlora.system.storage import write_json_atomic

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")
WORTH_ROUNDING = 1.25  # bf16 keeps 8 bits of a number; a smaller gain in speed is not worth them
# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = 2**31 - 1
_LARGEST_THRESHOLD = 32 * 2**20

_ABSENT = object()

_users: list[object] = []


def resolve_device(device: str) -> torch.device:
    _check_name("run.device", device, ["auto", "cpu", "cuda"])
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device is cuda, but PyTorch finds no CUDA device here; use auto or cpu")
    if device == "auto" and os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes", "on", "y", "t"}:
        device = "cpu"  # as `accelerate launch --cpu` asks
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def visible_gpus() -> list[str]:
    """Name the GPUs here as CUDA_VISIBLE_DEVICES does: by number, UUID, or that of a part of one (MIG)."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(number) for number in range(count)] if shown is None else [name.strip() for name in shown.split(",")]
    # Of several parts a process sees the first alone. Otherwise names from the first wrong one on do not count.
    return names if count and all(name.startswith("MIG-") for name in names) else names[:count]


def resolve_precision(precision: str, device: str) -> tuple[str, str]:
    """Choose the number format of the matrix products, and say why."""
    _check_name("run.precision", precision, ["auto", *DTYPES])
    best = _best_on_cuda if (place := resolve_device(device)).type == "cuda" else _best_on_cpu
    if precision == "auto":
        return best()
    if precision == "fp16" and place.type == "cpu":
        raise ConfigError("run.precision is fp16, which is for CUDA devices; on a CPU use auto, bf16 or fp32")
    slow = precision == "bf16" and best()[0] != "bf16"
    return precision, "as set" + (", though bf16 is no faster than fp32 on this machine" if slow else "")


def _check_name(key: str, name: str, known: list[str]) -> None:
    if name not in known:
        raise ConfigError(f"{key} is one of {', '.join(known)}; got {name!r}.{did_you_mean(name, known)}")


def settle_precision(precision: str, device: str, file: Path) -> tuple[str, str]:
    """Choose the number format, and `auto` once for all that share a file: a second timing may come out otherwise."""
    if precision != "auto":
        return resolve_precision(precision, device)
    kind, answers = resolve_device(device).type, dict[str, tuple[str, str]]()
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):  # missing or damaged
            found = json.loads(file.read_text(encoding="utf-8"))
            answers = {one: (name, str(reason)) for one, (name, reason) in found.items() if name in DTYPES}
        if kind not in answers:
            answers[kind] = resolve_precision(precision, device)
            write_json_atomic(file, answers)
    return answers[kind]


def _best_on_cuda() -> tuple[str, str]:
    name = torch.cuda.get_device_name()
    if torch.cuda.get_device_capability() >= (8, 0):
        return "bf16", f"{name} has native bf16 products"
    return "fp16", f"{name} has no native bf16 products, so fp16 with loss scaling"


def _best_on_cpu() -> tuple[str, str]:
    feature = next((flag for flag in BF16_FEATURES if flag in _cpu_flags()), "")
    if not feature:
        return "fp32", "the CPU has no bf16 products"
    if _bf16_speed_up() < WORTH_ROUNDING:
        return "fp32", f"the CPU's bf16 products ({feature}) are no faster than fp32's, as timed"
    return "bf16", f"the CPU's bf16 products ({feature}) are faster than fp32's, as timed"


@functools.cache
def _bf16_speed_up() -> float:
    """Time a product of an encoder's size in both formats; instruction sets do not tell (`benchmarks/README.md`).

    By one thread, in turn: beside another process one of two threads waits, which says nothing of the product.
    """
    pairs = [
        (torch.ones(512, 768, dtype=name), torch.ones(768, 768, dtype=name)) for name in (torch.float32, torch.bfloat16)
    ]
    seconds: list[list[float]] = [[], []]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(8):
            for (left, right), taken in zip(pairs, seconds, strict=True):
                start = time.perf_counter()
                left @ right
                taken.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[0]) / min(seconds[1])


def _cpu_flags() -> frozenset[str]:
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    return frozenset(name for name, value in torch.cpu.get_capabilities().items() if value is True)


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Let a forward pass multiply in `precision`."""
    if precision == "fp32":
        yield
        return
    try:
        # The cache holds every weight once more until the context ends: on a GPU the memory is dear and a cast is not.
        with torch.autocast(device.type, dtype=DTYPES[precision], cache_enabled=device.type == "cpu"):
            yield
    except RuntimeError as fault:
        if "overflow" not in str(fault) and "dtype" not in str(fault):
            raise
        told = f"this model cannot compute in {precision}, as transformers has it ({first_line(fault):.200})"
        raise ModelError(f"{told}; set run.precision to fp32") from fault


@contextmanager
def kept_exact(layer: nn.Linear | None) -> Iterator[None]:
    """Let a layer multiply in fp32 under autocast, too."""
    if layer is None:
        yield
        return
    forward = layer.forward

    def exact(rows: Tensor) -> Tensor:
        with torch.autocast(rows.device.type, enabled=False):
            return forward(rows.float())

    layer.forward = exact  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del layer.forward


@contextmanager
def frozen_in_half(model: nn.Module, precision: str) -> Iterator[int]:
    """Hold frozen linear layers in half precision, as autocast would cast them in every step; all is back on exit."""
    layers = [] if precision == "fp32" else _frozen_linear_layers(model)
    originals = [(parameter, parameter.data) for layer in layers for parameter in layer.parameters()]
    try:
        for parameter, original in originals:
            parameter.data = original.to(DTYPES[precision])
        yield len(layers)
    finally:
        for parameter, original in originals:
            parameter.data = original.to(parameter.device)


def _frozen_linear_layers(model: nn.Module) -> list[nn.Linear]:
    owners = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    # DoRA takes the norm of the base weight.
    dora = {name for name, module in model.named_modules() if any(getattr(module, "use_dora", {}).values())}
    return [
        module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and name.rpartition(".")[0] not in dora
        and all(not p.requires_grad and owners[id(p)] == 1 for p in module.parameters(recurse=False))
        and module.weight.dtype == torch.float32
    ]


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Let glibc reuse the large blocks that it frees: mapping and clearing them afresh takes longer than products."""
    tuned = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    libc: Any = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" and not tuned else None
    if not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    _users.append(device)
    if len(_users) == 1:
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        _users.pop()
        if not _users:
            # glibc's own limits, its threshold at the value that it would have found by itself.
            libc.mallopt(_MMAP_MAX, 65536)
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD)
            libc.mallopt(_TRIM_THRESHOLD, 2 * _LARGEST_THRESHOLD)
            libc.malloc_trim(0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and put the model back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def dropout_set(model: nn.Module, rate: float | None) -> Iterator[int]:
    """Train with another dropout than the model's config asks for, which stays as it is; its own comes back on exit."""
    places = [] if rate is None else _places(model)
    try:
        for module, name, _ in places:
            setattr(module, name, rate)
        yield len(places)
    finally:
        for module, name, own in places:
            setattr(module, name, own)


def _places(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Find the rates of dropout modules, and those that attention functions read in place of one (ModernBERT)."""
    return [
        (module, name, value)
        for path, module in model.named_modules()
        if "lora_dropout" not in path.split(".")
        for name, value in vars(module).items()
        if (name == "p" if isinstance(module, nn.Dropout) else "dropout" in name and isinstance(value, float))
    ]


@contextmanager
def activations_recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Keep only each layer's input for the backward pass, which computes the same bits again (Chen et al., 2016)."""
    if not wanted:
        yield
        return
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if not getattr(base, "supports_gradient_checkpointing", False):
        raise ConfigError(
            f"train.gradient_checkpointing: {type(base).__name__} cannot compute its layers again; lower "
            "micro_batch_tokens in teacher.train or student.train to save memory"
        )
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # older releases lack the new names
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            base.gradient_checkpointing_disable()


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Take back what Trainer and Accelerate leave on a model: a forward under autocast for ever, and a config entry."""
    names = ("_original_forward", "forward", "_is_accelerate_prepared")  # with the last, the next has no autocast
    places = [*((vars(model), name) for name in names), (vars(model.config), "use_cache")]
    own = [values.get(name, _ABSENT) for values, name in places]
    try:
        yield
    finally:
        for (values, name), value in zip(places, own, strict=True):
            values.pop(name, None)
            if value is not _ABSENT:
                values[name] = value
