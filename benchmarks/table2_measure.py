"""What is measured, each in a process of its own: peak memory of training, time of inference."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from table2_models import BATCH, TASK, Size, build_adapted, build_encoder, padded_tokens, synthetic_rows
from torch import Tensor, nn

from kdlora.config import DistilConfig, StudentTrainConfig, TeacherTrainConfig
from kdlora.data.batches import Collator
from kdlora.distil.inference import INPUTS
from kdlora.distil.precision import autocast, resolve_device
from kdlora.distil.session import TrainingOptions
from kdlora.distil.train import train_model
from kdlora.models.adapters import merge_student
from kdlora.system.children import run_in_child
from kdlora.system.environment import forget_peak, peak_since, read_memory

METHODS = ("FFT", "LoRA", "KD-LoRA")
TIMED = ("FFT", "LoRA", "LoRA, merged", "KD-LoRA, merged")


@dataclass(frozen=True)
class Conditions:
    """Under which a figure is taken.

    Attributes:
        precision: `fp32`, `bf16` or `fp16`.
        device: `cpu` or `cuda`.
        rank: of the adapters.
        seed: of weights and rows.
    """

    precision: str
    device: str = "cpu"
    rank: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Inference over the whole validation set.

    Attributes:
        seconds: for each of `TIMED` one figure per run, brought to the whole set.
        share: of the padded tokens that were really run.
        threads: of the CPU.
        occupied: CPU time over wall time and threads; well below 1 on a CPU that others use too.
    """

    seconds: dict[str, list[float]]
    share: float
    threads: int
    occupied: float


def peak_of_training(size: Size, method: str, lengths: Sequence[int], steps: int, conditions: Conditions) -> int | None:
    """Measure the peak memory of a few optimiser steps, in a process of its own.

    Args:
        size: of the model that is trained.
        method: one of `METHODS`.
        lengths: tokens of each row of the batch; every step trains on these rows.
        steps: optimiser steps; from the second on, the optimiser's state is there.
        conditions: precision, device, rank, seed.

    Returns:
        Bytes: of the process above its level after imports, or CUDA's own count; None where the system gives none.
    """
    return run_in_child(_peak_of_steps, size, method, lengths, steps, conditions)


def _peak_of_steps(*arguments: Any) -> int | None:
    """Train, and read the peak afterwards; for a child."""
    level = read_memory()
    train_steps(*arguments)
    return peak_since(level)


def train_steps(size: Size, method: str, lengths: Sequence[int], steps: int, conditions: Conditions) -> int:
    """Train with the very call that an experiment makes: one batch an epoch, `steps` epochs.

    Args:
        size: of the model that is trained.
        method: one of `METHODS`.
        lengths: tokens of each row of the batch.
        steps: optimiser steps.
        conditions: precision, device, rank, seed.

    Returns:
        The optimiser steps made.
    """
    taught = method == "KD-LoRA"
    if method == "FFT":
        encoder = build_encoder(size, seed=conditions.seed)
        model, settings = encoder.model, TeacherTrainConfig(epochs=steps, batch_size=len(lengths))
    else:
        model, encoder = build_adapted(size, conditions.rank, seed=conditions.seed)
        settings = StudentTrainConfig(epochs=steps, batch_size=len(lengths))
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()  # what building the model took in passing is not training
        outcome = train_model(
            model,
            encoder.tokenizer,
            synthetic_rows(size, lengths, seed=conditions.seed, taught=taught),
            synthetic_rows(size, lengths[:4], seed=conditions.seed),  # a training validates; this is next to nothing
            TASK,
            settings,
            TrainingOptions(
                Path(folder),
                seed=conditions.seed,
                precision=conditions.precision,
                device=conditions.device,
                distil=DistilConfig() if taught else None,
                checkpoint_seconds=1e9,  # none: they are timed by the clock
            ),
        )
    return outcome.steps


def time_inference(
    sizes: tuple[Size, Size], lengths: Sequence[int], runs: int, every: int, conditions: Conditions
) -> Timing:
    """Time inference with all methods of a family, in a process of their own.

    Args:
        sizes: of the model of FFT and LoRA, and of KD-LoRA's.
        lengths: tokens of each sentence of the set.
        runs: passes that count, after one that does not.
        every: run every so many-th batch alone, and scale by padded tokens; 1 runs them all.
        conditions: precision, device, rank, seed.
    """
    return run_in_child(time_methods, sizes, lengths, runs, every, conditions)


def time_methods(
    sizes: tuple[Size, Size], lengths: Sequence[int], runs: int, every: int, conditions: Conditions
) -> Timing:
    """Run the methods in turn in every round, so that what else the machine does falls on all of them.

    Args:
        sizes: of the model of FFT and LoRA, and of KD-LoRA's.
        lengths: tokens of each sentence of the set.
        runs: rounds that count, after one that does not.
        every: run every so many-th batch alone.
        conditions: precision, device, rank, seed.
    """
    place = resolve_device(conditions.device)
    chosen, share = batches_to_run(lengths, every)
    teacher, student = ([_collate(size, batch, conditions.seed) for batch in chosen] for size in sizes)
    models = _timed_models(sizes, conditions)
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    worked = waited = 0.0
    for turn in range(runs + 1):
        for name, model in zip(TIMED, models, strict=True):
            batches = student if model is models[-1] else teacher
            taken, on_cpu = _pass(model.to(place), batches, place, conditions.precision)
            worked, waited = worked + on_cpu, waited + taken
            if turn:  # the first round warms up
                seconds[name].append(taken / share)
    threads = torch.get_num_threads()
    return Timing(seconds, share, threads, worked / (waited * threads))


def batches_to_run(lengths: Sequence[int], every: int) -> tuple[list[list[int]], float]:
    """Cut a set into batches of like length, and take some.

    Args:
        lengths: tokens of each sentence.
        every: take one of so many, from the middle of each group.

    Returns:
        The lengths in each batch taken, and their share of all padded tokens.
    """
    ordered = sorted(lengths, reverse=True)
    batches = [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
    taken = batches[min(every // 2, len(batches) - 1) :: every]
    return taken, sum(map(padded_tokens, taken)) / sum(map(padded_tokens, batches))


def _timed_models(sizes: tuple[Size, Size], conditions: Conditions) -> list[nn.Module]:
    """Build what `TIMED` names, in evaluation mode."""
    teacher, student = sizes
    adapted, _ = build_adapted(teacher, conditions.rank, seed=conditions.seed)
    small, _ = build_adapted(student, conditions.rank, seed=conditions.seed)
    full = build_encoder(teacher, seed=conditions.seed).model
    return [model.eval() for model in (full, adapted, merge_student(adapted), merge_student(small))]


def _collate(size: Size, lengths: Sequence[int], seed: int) -> dict[str, Tensor]:
    """Make the tensors of a batch, as a trained model gets them."""
    rows = synthetic_rows(size, lengths, seed=seed)
    inputs = rows.dataset.select_columns([name for name in INPUTS if name in rows.dataset.column_names])
    return Collator(size.settings["pad_token_id"], TASK.kind, rows.max_length)(list(inputs))


def _pass(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], place: torch.device, precision: str
) -> tuple[float, float]:
    """Run all batches once, from host memory; give seconds until the last logits are there, and of CPU time."""
    with torch.inference_mode(), autocast(precision, place):
        # Autocast casts a weight once a pass. Timed over a few batches and scaled, that would count many times over.
        model(**{name: tensor[:1].to(place) for name, tensor in batches[-1].items()})
        _wait_for(place)
        start, worked = time.perf_counter(), time.process_time()
        for batch in batches:
            model(**{name: tensor.to(place) for name, tensor in batch.items()})
        _wait_for(place)
        return time.perf_counter() - start, time.process_time() - worked


def _wait_for(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
