"""What a run costs: time of a forward pass, size on disk, peak memory of a process of its own."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from kdlora.evidence.records import Latency
from kdlora.system.forkserver import call_in_child, findable_module, start_server

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


T = TypeVar("T")

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryLevel:
    """Memory of this process, bytes.

    Attributes:
        resident: all of it that is in memory (`VmRSS`).
        anonymous: its own pages, without those of mapped files (`RssAnon`).
        mapped: pages of mapped files: libraries, and weights read through a map (`RssFile`).
        high_water: the largest `resident` since the start or the last `forget_peak` (`VmHWM`).
    """

    resident: int
    anonymous: int
    mapped: int
    high_water: int


def read_memory() -> MemoryLevel | None:
    """Read this process's memory."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    names = ("VmRSS", "RssAnon", "RssFile", "VmHWM")
    if any(name not in fields for name in names):
        return None
    return MemoryLevel(*(int(fields[name].split()[0]) * 1024 for name in names))


def forget_peak() -> None:
    """Let the high-water mark start again from the present level, and CUDA's with it.

    Call it between loading and training: the map through which weights are read counts as long as it is open.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return
    finally:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()


@dataclass(frozen=True)
class Measured(Generic[T]):
    """The outcome of a function that ran in a process of its own.

    Attributes:
        value: what it returned.
        peak_memory_bytes: the peak of CUDA's allocator where the function used CUDA; else the peak of the
            process's own memory above the level after imports. None where the system gives no figure.
        seconds: wall-clock time of the function.
    """

    value: T
    peak_memory_bytes: int | None
    seconds: float


def run_in_child(
    function: Callable[..., T], *arguments: Any, on_message: Callable[[Any], None] | None = None
) -> Measured[T]:
    """Run a function in a process of its own, so that its memory is its own.

    The process is forked from a server that has imported the function's module, so the imports are paid for
    once and are not part of the figure. It has the caller's environment and working directory. Where the system
    cannot fork, the function runs in this process and the peak is None.
    """
    if not hasattr(os, "fork"):
        sender = () if on_message is None else (on_message,)
        start = time.perf_counter()
        return Measured(function(*arguments, *sender), None, time.perf_counter() - start)
    measured: Measured[T] = call_in_child(
        _measure, (function, arguments), on_message, preload=findable_module(function)
    )
    return measured


def prepare_children(module: str) -> None:
    """Start the server of children while this process still imports: a command begins that much sooner."""
    if hasattr(os, "fork"):
        start_server(module)


def _measure(function: Callable[..., T], arguments: tuple[Any, ...], *sender: Callable[..., None]) -> Measured[T]:
    """Run a function and read the peak afterwards; this is the child's main function."""
    forget_peak()
    before = read_memory()
    start = time.perf_counter()
    value = function(*arguments, *sender)
    seconds = time.perf_counter() - start
    return Measured(value, peak_since(before), seconds)


def peak_since(before: MemoryLevel | None) -> int | None:
    """Give the peak above an earlier level of this process.

    A child of a fork shares its anonymous pages from the start but maps the library files anew, page by page, as
    it touches them; those pages are left out on both sides.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    after = read_memory()
    if before is None or after is None:
        return None
    return max(0, after.high_water - after.mapped - before.anonymous)


def time_calls(
    call: Callable[[Any], object],
    inputs: Sequence[Any],
    *,
    warm_up: int = 5,
    repeats: int = 50,
    limit_seconds: float = 10.0,
) -> tuple[float, float]:
    """Time a call over a cycle of inputs."""
    if not inputs or repeats < 1:
        raise ValueError("expected at least one input and one repeat")
    begin = time.perf_counter()
    for turn in range(warm_up):
        if turn and time.perf_counter() - begin > limit_seconds / 2:
            break
        call(inputs[turn % len(inputs)])
    times: list[float] = []
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - begin > limit_seconds:
            break
        start = time.perf_counter()
        call(inputs[turn % len(inputs)])
        times.append(1000 * (time.perf_counter() - start))
    p50, p95 = np.percentile(times, [50, 95])
    return float(p50), float(p95)


def measure_latency(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    *,
    max_length: int,
    batch_sizes: Sequence[int] = (1, 32),
    repeats: int = 50,
    limit_seconds: float = 10.0,
) -> list[Latency]:
    """Time the forward pass of a model on real texts, tokenised beforehand, in the model's own precision."""
    import torch

    device = next(model.parameters()).device

    def forward(batch: Mapping[str, Any]) -> None:
        model(**batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    was_training = model.training
    model.eval()
    result = []
    try:
        with torch.inference_mode():
            for size in batch_sizes:
                batches = [
                    {name: tensor.to(device) for name, tensor in _encode(tokenizer, chunk, max_length).items()}
                    for chunk in _cycle_rows(rows, size, batches=repeats)
                ]
                p50, p95 = time_calls(forward, batches, repeats=repeats, limit_seconds=limit_seconds)
                result.append(Latency(batch_size=size, p50_ms=p50, p95_ms=p95, threads=torch.get_num_threads()))
    finally:
        model.train(was_training)
    return result


def _cycle_rows(rows: Dataset, size: int, *, batches: int) -> list[dict[str, list[str]]]:
    """Cut the first rows into full batches; as many as there are rows for, at least one."""
    if not len(rows):
        raise ValueError("expected at least one row to time the model on")
    count = min(batches, max(1, len(rows) // size))
    columns = [name for name in ("text", "text_pair") if name in rows.column_names]
    chosen = [[(start * size + row) % len(rows) for row in range(size)] for start in range(count)]
    return [{name: [rows[row][name] for row in numbers] for name in columns} for numbers in chosen]


def _encode(tokenizer: PreTrainedTokenizerBase, chunk: dict[str, list[str]], max_length: int) -> Mapping[str, Any]:
    """Tokenise one batch, cut to what both the caller and the model's positions allow."""
    limit = min(max_length, tokenizer.model_max_length)
    encoded: Mapping[str, Any] = tokenizer(
        chunk["text"], chunk.get("text_pair"), truncation=True, max_length=limit, padding=True, return_tensors="pt"
    )
    return encoded
