"""What Table 2 is measured by, each in a process of its own: peak memory of training, time of inference."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from table2_models import TASK, VALIDATION_COUNTS, Size, batches_to_run, build_model, lengths_of, synthetic_rows
from torch import Tensor, nn

from kdlora.config import DistilConfig, StudentTrainConfig, TeacherTrainConfig
from kdlora.data.batches import INPUTS, Collator
from kdlora.distil.precision import autocast, resolve_device
from kdlora.distil.train import train_model
from kdlora.distil.trainer import TrainingOptions
from kdlora.models.adapters import merge_student
from kdlora.system.environment import forget_peak, peak_since, read_memory

METHODS = ("FFT", "LoRA", "KD-LoRA")
TIMED = ("FFT", "LoRA", "LoRA, merged", "KD-LoRA, merged")
RANK = 8


@dataclass(frozen=True)
class Conditions:
    """Under which a figure is taken; one batch of so many is timed, one optimiser step has the rows of `lengths`."""

    precision: str = "fp32"
    device: str = "cpu"
    steps: int = 2
    runs: int = 3
    every: int = 8


@dataclass(frozen=True)
class Timing:
    """Inference over the whole validation set: seconds by name, one figure a run.

    `occupied` is CPU time over wall time and threads: well below 1 on a CPU that others use too.
    """

    seconds: dict[str, list[float]]
    threads: int
    occupied: float


def train_steps(size: Size, method: str, lengths: Sequence[int], conditions: Conditions) -> tuple[int, int | None]:
    """Train with the call that an experiment makes, one batch an epoch: optimiser steps, and peak bytes.

    From the second step on the optimiser's state is there. None where the system counts no memory.
    """
    before = read_memory()
    taught, rank = method == "KD-LoRA", None if method == "FFT" else RANK
    model, encoder = build_model(size, rank)
    settings = TeacherTrainConfig if rank is None else StudentTrainConfig
    with tempfile.TemporaryDirectory() as folder:
        forget_peak()  # what building the model took in passing is not training
        outcome = train_model(
            model,
            encoder.tokenizer,
            synthetic_rows(size, lengths, taught=taught),
            synthetic_rows(size, lengths[:4]),  # a training validates; this is next to nothing
            TASK,
            settings(epochs=conditions.steps, batch_size=len(lengths)),
            TrainingOptions(
                Path(folder),
                precision=conditions.precision,
                device=conditions.device,
                distil=DistilConfig() if taught else None,
                checkpoint_seconds=1e9,  # none: they are timed by the clock
            ),
        )
    return outcome.steps, peak_since(before)


def time_methods(sizes: tuple[Size, Size], conditions: Conditions) -> Timing:
    """Run the methods in turn in every round, so that what else the machine does falls on all of them."""
    place = resolve_device(conditions.device)
    chosen, share = batches_to_run(lengths_of(VALIDATION_COUNTS), conditions.every)
    teacher, student = ([_collate(size, batch) for batch in chosen] for size in sizes)
    full, adapted, small = (
        build_model(size, rank)[0] for size, rank in ((sizes[0], None), (sizes[0], RANK), (sizes[1], RANK))
    )
    models = [model.eval() for model in (full, adapted, merge_student(adapted), merge_student(small))]
    seconds: dict[str, list[float]] = {name: [] for name in TIMED}
    worked = waited = 0.0
    for turn in range(conditions.runs + 1):
        for name, model in zip(TIMED, models, strict=True):
            batches = student if model is models[-1] else teacher
            taken, on_cpu = _pass(model.to(place), batches, place, conditions.precision)
            worked, waited = worked + on_cpu, waited + taken
            if turn:  # the first round warms up
                seconds[name].append(taken / share)
    threads = torch.get_num_threads()
    return Timing(seconds, threads, worked / (waited * threads))


def _collate(size: Size, lengths: Sequence[int]) -> dict[str, Tensor]:
    """Make the tensors of a batch, as a trained model gets them."""
    rows = synthetic_rows(size, lengths)
    inputs = rows.dataset.select_columns([name for name in INPUTS if name in rows.dataset.column_names])
    return Collator(size.settings["pad_token_id"], rows.max_length, TASK.kind)(list(inputs))


def _pass(
    model: nn.Module, batches: Sequence[dict[str, Tensor]], place: torch.device, precision: str
) -> tuple[float, float]:
    """Run all batches once, from host memory; give seconds until the last logits are there, and of CPU time."""
    wait = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    with torch.inference_mode(), autocast(precision, place):
        # Autocast casts a weight once a pass. Timed over a few batches and scaled, that would count many times over.
        model(**{name: tensor[:1].to(place) for name, tensor in batches[-1].items()})
        wait()
        start, worked = time.perf_counter(), time.process_time()
        for batch in batches:
            model(**{name: tensor.to(place) for name, tensor in batch.items()})
        wait()
        return time.perf_counter() - start, time.process_time() - worked
