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
from harness import command_line, in_process, markdown, tell_machine

CHUNK = 100_000
STAGES = ("load", "read logits", "attach", "tokenise", "buckets of an epoch")


def write_table(path: Path, count: int, make: Callable[[int, int], dict[str, Any]]) -> None:
    """Write so many rows, chunk by chunk."""
    schema = pa.table(make(0, 1)).schema
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, CHUNK):
            writer.write_table(pa.table(make(start, min(CHUNK, count - start)), schema=schema))


def invent_texts(words: int) -> Callable[[int, int], dict[str, Any]]:
    """Make short texts with a label."""
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{number % 700} {number}" for number in range(5000)])

    def make(start: int, rows: int) -> dict[str, Any]:
        texts = [" ".join(row) for row in vocabulary[draw.integers(0, 5000, size=(rows, words))]]
        return {"text": texts, "label": np.where(draw.random(rows) < 0.5, "no", "yes").tolist()}

    return make


def invent_logits(start: int, rows: int) -> dict[str, Any]:
    """Make a teacher's table for these rows."""
    values = np.random.default_rng(start).normal(size=(2, rows)).astype(np.float32)
    return {"id": [str(row) for row in range(start, start + rows)], "no": values[0], "yes": values[1]}


class AnonymousPeak:
    """Samples the anonymous memory of this process in a thread."""

    def __init__(self) -> None:
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


def measure(folder: Path, tokenizer: str) -> dict[str, float]:
    """Prepare the rows once, stage by stage."""
    import torch  # noqa: F401 - imported before the level is taken, as in a run
    from transformers import AutoTokenizer

    from kdlora import load_splits, read_teacher_table
    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.batches import LengthBucketSampler, tokenise
    from kdlora.distil.inference import column_values

    reader = AutoTokenizer.from_pretrained(tokenizer)
    peak, used, times = AnonymousPeak(), time.process_time(), [time.perf_counter()]

    def done(result: Any) -> Any:
        times.append(time.perf_counter())
        return result

    data = DataConfig(train=str(folder / "train.parquet"), validation=str(folder / "validation.parquet"))
    splits = done(load_splits(TaskConfig(text=["text"], label="label"), data))
    logits = done(read_teacher_table(folder / "logits.parquet", splits.task, values="logits"))
    rows = done(logits.attach(splits.train))
    tokens = done(tokenise(rows, reader, 128))
    done(sum(1 for _ in LengthBucketSampler(column_values(tokens.dataset, "length"), 32, seed=0)))
    seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    return {**seconds, "all": times[-1] - times[0], "cpu": time.process_time() - used, "peak_bytes": peak.stop()}


def main(options: argparse.Namespace) -> None:
    """Measure each size in a process of its own, and print."""
    lines = []
    for count in options.rows:
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for name, rows in (("train", count), ("validation", 100)):
                write_table(folder / f"{name}.parquet", rows, invent_texts(options.words))
            write_table(folder / "logits.parquet", count, invent_logits)
            environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
            found = in_process(__file__, {"folder": place, "tokenizer": options.tokenizer}, **environment)
        seconds = [f"{found[name]:,.2f}" for name in (*STAGES, "all", "cpu")]
        lines.append((f"{count:,}", *seconds, f"{found['peak_bytes'] / 1e6:,.0f}"))
        print(lines[-1], flush=True)
    print(markdown(("rows", *STAGES, "all, s", "CPU, s", "peak, MB"), lines, 0))
    tell_machine()


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        work = json.loads(sys.argv[1])
        print(json.dumps(measure(Path(work["folder"]), work["tokenizer"])))
    else:
        parser = command_line(__doc__)
        parser.add_argument("--tokenizer", required=True)
        parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
        parser.add_argument("--words", type=int, default=4)
        main(parser.parse_args())
