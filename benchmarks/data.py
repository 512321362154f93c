"""Preparation of data by number of rows: load, tokenise, bucket, attach a teacher's logits.

    python benchmarks/data.py --tokenizer DIR [--rows 10000 100000 1000000] [--words 4]

Every size is a process of its own, and every stage gives its seconds; `CPU` is the processor time of all of them, which
other work on the machine does not lengthen. Memory is the highest anonymous resident memory of the process above its
level after imports (pages of mapped files, which the system may drop, left out), sampled every 20 milliseconds.
`attach` starts from logits stored on disk: reading, checking and matching by id.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from kdlora.system.environment import collect_versions, describe_machine

CHUNK = 100_000


def write_rows(path: Path, count: int, words: int) -> None:
    """Write short invented texts with a label, chunk by chunk."""
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{number % 700} {number}" for number in range(5000)])
    schema = pa.schema({"text": pa.string(), "label": pa.string()})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, CHUNK):
            rows = min(CHUNK, count - start)
            picked = vocabulary[draw.integers(0, 5000, size=(rows, words))]
            texts = [" ".join(row) for row in picked]
            labels = np.where(draw.random(rows) < 0.5, "no", "yes")
            writer.write_table(pa.table({"text": texts, "label": labels.tolist()}, schema=schema))


def write_logits(path: Path, count: int) -> None:
    """Write a teacher's table for these rows."""
    draw = np.random.default_rng(1)
    with pq.ParquetWriter(path, pa.schema({"id": pa.string(), "no": pa.float32(), "yes": pa.float32()})) as writer:
        for start in range(0, count, CHUNK):
            ids = [str(row) for row in range(start, min(start + CHUNK, count))]
            values = draw.normal(size=(2, len(ids))).astype(np.float32)
            columns = {"id": ids, "no": pa.array(values[0]), "yes": pa.array(values[1])}
            writer.write_table(pa.table(columns, schema=writer.schema))


class AnonymousPeak:
    """Samples the anonymous memory of this process in a thread."""

    def __init__(self) -> None:
        """Note the level of now."""
        from kdlora.system.environment import read_memory

        self.read: Callable[[], Any] = read_memory
        self.level = self.highest = self.read().anonymous
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.stopped.wait(0.02):
            self.highest = max(self.highest, self.read().anonymous)

    def stop(self) -> int:
        """End; the rise in bytes."""
        self.stopped.set()
        self.thread.join()
        return max(self.highest, self.read().anonymous) - self.level


def measure(folder: Path, tokenizer: str, count: int, words: int) -> dict[str, float]:
    """Prepare the rows once, stage by stage."""
    import torch  # noqa: F401 - imported before the level is taken, as in a run
    from transformers import AutoTokenizer

    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.batches import LengthBucketSampler, tokenise
    from kdlora.data.load import load_splits
    from kdlora.distil.inference import column_values
    from kdlora.distil.tables import read_teacher_table

    reader = AutoTokenizer.from_pretrained(tokenizer)
    peak, seconds = AnonymousPeak(), {}
    used = time.process_time()

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[stage] = time.perf_counter() - start
        return result

    data = DataConfig(train=str(folder / "train.parquet"), validation=str(folder / "validation.parquet"))
    splits = timed("load", lambda: load_splits(TaskConfig(text=["text"], label="label"), data))
    logits = timed("logits", lambda: read_teacher_table(folder / "logits.parquet", splits.task, values="logits"))
    rows = timed("attach", lambda: logits.attach(splits.train))
    tokens = timed("tokenise", lambda: tokenise(rows, reader, 128))
    sampler = LengthBucketSampler(column_values(tokens.dataset, "length"), 32, seed=0)
    timed("bucket", lambda: sum(1 for _ in sampler))
    return {**seconds, "cpu": time.process_time() - used, "peak_bytes": peak.stop()}


def in_process(options: argparse.Namespace, count: int) -> dict[str, float]:
    """Make the rows, and measure in a process of its own."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "train.parquet", count, options.words)
        write_rows(folder / "validation.parquet", 100, options.words)
        write_logits(folder / "logits.parquet", count)
        work = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--words", str(options.words)]
        environment = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}

        done = subprocess.run(
            [*work, "--measure", place, "--rows", str(count)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **environment},
        )
    if done.returncode:
        sys.exit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(options: argparse.Namespace) -> None:
    """Measure and print."""
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokenizer, options.rows[0], options.words)))
        return
    table = Table(
        "rows", "load", "read logits", "attach", "tokenise", "bucket an epoch", "all, s", "CPU, s", "peak, MB"
    )
    for count in options.rows:
        found = in_process(options, count)
        stages = [found[name] for name in ("load", "logits", "attach", "tokenise", "bucket")]
        cells = [f"{value:.2f}" for value in [*stages, sum(stages), found["cpu"]]]
        table.add_row(f"{count:,}", *cells, f"{found['peak_bytes'] / 1e6:,.0f}")
        print(count, found, flush=True)
    Console(width=120).print(table)
    print(json.dumps({"machine": describe_machine(), "versions": collect_versions()}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--words", type=int, default=4)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    main(parser.parse_args())
