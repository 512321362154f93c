"""How near a training step and the teacher's labelling come to what the machine can multiply.

    python benchmarks/roofline.py --models DIR [--student minilm-l6] [--teacher mpnet-base] [--seconds 3]

The peak is the best of square matrix products of 2,048 and 4,096 in the same process. Model FLOPs are those of the
matrix products alone, an addition counted beside its multiplication: per token and layer `2 x weights` of the forward
pass, and as much again for the gradient of its input, where the frozen weights take none; attention adds
`4 x length x width`. Adapters, embeddings, norms and everything else that a step does count as no work, only as time.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from harness import command_line, markdown, tell_machine
from training_variants import train_for

from kdlora.config import DistilConfig, LoraConfig, StudentTrainConfig
from kdlora.data.batches import Tokenised
from kdlora.data.tasks import Task
from kdlora.distil.inference import predict_logits
from kdlora.distil.precision import DTYPES
from kdlora.models.encoders import Encoder, load_encoder

TASK = Task("single-label", ("text",), ("label",), ("no", "yes"), ("accuracy",))
GRID = tuple((batch, length) for batch in (8, 32) for length in (16, 64, 128))


def measure_peak(precision: str) -> float:
    """Multiply square matrices of 2,048 and 4,096; the best rate, FLOP/s."""
    best = 0.0
    for size in (2048, 4096):
        left, right = (torch.randn(size, size).to(DTYPES[precision]) for _ in range(2))
        torch.mm(left, right)
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(left, right)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def forward_flops(encoder: Encoder, length: int) -> float:
    """Count the products of one row's forward pass through the layers."""
    config: Any = encoder.model.config
    width, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * config.intermediate_size)
    return 2.0 * weights * length + layers * 4.0 * length * length * width


def rows_of(encoder: Encoder, count: int, length: int) -> Tokenised:
    """Invent rows of one length, with labels and a teacher's logits."""
    draw = np.random.default_rng(0)
    table = {
        "id": [str(row) for row in range(count)],
        "input_ids": draw.integers(1000, encoder.model.config.vocab_size - 1, size=(count, length)).tolist(),
        "length": [length] * count,
        "label": draw.integers(0, 2, size=count).tolist(),
        "teacher_logits": draw.normal(size=(count, 2)).astype(np.float32).tolist(),
    }
    return Tokenised(Dataset.from_dict(table), 0, length)


def training_rate(folder: Path, precision: str, batch: int, length: int, seconds: float) -> tuple[float, float]:
    """Train adapters for a while: rows a second, and the FLOPs of one row's step."""
    encoder = load_encoder(str(folder), TASK, seed=0)
    flops = 2 * forward_flops(encoder, length)
    rows = [rows_of(encoder, count, length) for count in (64 * batch, 2)]
    settings = StudentTrainConfig(epochs=1000, batch_size=batch)
    options = {"precision": precision, "distil": DistilConfig()}
    outcome = train_for(seconds, encoder, rows, TASK, settings, LoraConfig(), options)
    return outcome.examples_per_second, flops


def labelling_rate(folder: Path, precision: str, batch: int, length: int, seconds: float) -> tuple[float, float]:
    """Label for a while: rows a second, and the FLOPs of one row's forward pass."""
    encoder = load_encoder(str(folder), TASK, seed=0)
    rows = rows_of(encoder, batch, length)
    passes, start = -1, time.perf_counter()
    while passes < 0 or time.perf_counter() - start < seconds:
        predict_logits(encoder.model, encoder.tokenizer, rows, precision=precision, batch_tokens=batch * length)
        passes += 1
        start = time.perf_counter() if passes == 0 else start  # the first pass warms up
    return passes * batch / (time.perf_counter() - start), forward_flops(encoder, length)


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    peaks = {precision: measure_peak(precision) for precision in ("fp32", "bf16")}
    print({precision: f"{peak / 1e9:.0f} GFLOP/s" for precision, peak in peaks.items()})
    lines = []
    works = (("training step", options.student, training_rate), ("labelling", options.teacher, labelling_rate))
    for work, name, measure in works:
        for batch, length in GRID:
            cells = []
            for precision, peak in peaks.items():
                rate, flops = measure(options.models / name, precision, batch, length, options.seconds)
                cells.append(f"{rate:.1f}, {100 * rate * flops / peak:.0f}%")
            lines.append((f"{work}, {name}", f"{batch} × {length}", *cells))
    print(markdown(("work", "batch × length", *(f"{name}: rows/s, share of peak" for name in peaks)), lines, 2))
    tell_machine()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = command_line(__doc__, "models")
    parser.add_argument("--student", default="minilm-l6")
    parser.add_argument("--teacher", default="mpnet-base")
    parser.add_argument("--seconds", type=float, default=3.0)
    main(parser.parse_args())
