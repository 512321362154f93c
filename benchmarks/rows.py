"""Rows without end: what preparing them for a training takes, and labelling a million of them.

    python benchmarks/rows.py prepare --model DIR [--rows 10000 100000 1000000]
    python benchmarks/rows.py label --model DIR --folder DIR [--rows 1000000] [--seconds 115]

`prepare` loads, reads a teacher's logits from disk and attaches them by id, tokenises and buckets: every size is a
process of its own, every stage gives its seconds, and `CPU` is the processor time of all of them, which other work on
the machine does not lengthen. `label` lets a small encoder with a random head label made-up texts as `kdlora label`
does; a call that was stopped goes on where it was, and each adds its piece to `pieces.json`. Memory is anonymous
resident memory: of mapped files, which the system may drop, nothing is counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from harness import command_line, in_process, markdown, tell_machine

CHUNK = 100_000
STAGES = ("load", "read logits", "attach", "tokenise", "buckets of an epoch")


def write_rows(folder: Path, name: str, count: int) -> str:
    """Write short invented texts with id and label, and a teacher's table for them, chunk by chunk, once."""
    texts, logits = folder / f"{name}.parquet", folder / f"{name}-logits.parquet"
    if logits.exists():
        return str(texts)
    draw = np.random.default_rng(0)
    vocabulary = np.array([f"word{number % 700} {number}" for number in range(5000)])
    writers: list[pq.ParquetWriter] = []
    for start in range(0, count, CHUNK):
        rows = min(CHUNK, count - start)
        ids = [str(row) for row in range(start, start + rows)]
        words = [" ".join(row) for row in vocabulary[draw.integers(0, 5000, size=(rows, 4))]]
        labels = np.where(draw.random(rows) < 0.5, "no", "yes").tolist()
        said = draw.normal(size=(2, rows)).astype(np.float32)
        tables = [
            pa.table({"id": ids, "text": words, "label": labels}),
            pa.table({"id": ids, "no": said[0], "yes": said[1]}),
        ]
        if not writers:
            writers = [
                pq.ParquetWriter(file, table.schema) for file, table in zip((texts, logits), tables, strict=True)
            ]
        for writer, table in zip(writers, tables, strict=True):
            writer.write_table(table)
    for writer in writers:
        writer.close()
    return str(texts)


class AnonymousMemory(threading.Thread):
    """Samples the anonymous memory of this process above its level of now, every 20 milliseconds: MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        from kdlora.system.environment import read_memory

        self.read: Any = read_memory
        self.level, self.points, self.stopped = self.read().anonymous, [0.0], threading.Event()
        self.start()

    def run(self) -> None:
        """Sample until the end."""
        while not self.stopped.wait(0.02):
            self.points.append((self.read().anonymous - self.level) / 1e6)


def prepare_once(folder: Path, model: str) -> dict[str, float]:
    """Prepare the rows of a folder, stage by stage."""
    import torch  # noqa: F401 - imported before the level is taken, as in a run
    from transformers import AutoTokenizer

    from kdlora import load_splits, read_teacher_table
    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.batches import LengthBucketSampler, tokenise
    from kdlora.data.spool import read_column

    reader = AutoTokenizer.from_pretrained(model)
    memory, used, times = AnonymousMemory(), time.process_time(), [time.perf_counter()]

    def done(result: Any) -> Any:
        times.append(time.perf_counter())
        return result

    data = DataConfig(train=str(folder / "train.parquet"), validation=str(folder / "validation.parquet"))
    splits = done(load_splits(TaskConfig(text=["text"], label="label"), data))
    logits = done(read_teacher_table(folder / "train-logits.parquet", splits.task, values="logits"))
    rows = done(logits.attach(splits.train))
    tokens = done(tokenise(rows, reader, 128))
    done(sum(1 for _ in LengthBucketSampler(read_column(tokens.dataset, "length").to_numpy(), 32, seed=0)))
    seconds = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    return seconds | {"all": times[-1] - times[0], "cpu": time.process_time() - used, "peak": max(memory.points)}


def prepare(options: argparse.Namespace) -> None:
    """Measure each size in a process of its own, and print."""
    lines = []
    for count in options.rows or (10_000, 100_000, 1_000_000):
        with tempfile.TemporaryDirectory() as place:
            for name, rows in (("train", count), ("validation", 100)):
                write_rows(Path(place), name, rows)
            environment = os.environ | {"HF_DATASETS_CACHE": f"{place}/cache", "HF_HUB_OFFLINE": "1"}
            found = in_process(__file__, {"folder": place, "model": options.model}, **environment)
        seconds = [f"{found[name]:,.2f}" for name in (*STAGES, "all", "cpu")]
        lines.append((f"{count:,}", *seconds, f"{found['peak']:,.0f}"))
        print(lines[-1], flush=True)
    print(markdown(("rows", *STAGES, "all, s", "CPU, s", "peak, MB"), lines, 0))


class _TimeIsUpError(Exception):
    """The piece has lasted long enough."""


def label(options: argparse.Namespace) -> None:
    """Label until the end, or until the time is up."""
    from kdlora import label_collection, load_encoder
    from kdlora.data.tasks import DEFAULT_METRICS, Task
    from kdlora.models.encoders import save_encoder

    count, teacher = (options.rows or [1_000_000])[0], options.folder / "teacher"
    options.folder.mkdir(parents=True, exist_ok=True)
    if not teacher.exists():
        task = Task("single-label", ("text",), ("label",), ("no", "yes"), DEFAULT_METRICS["single-label"])
        encoder = load_encoder(options.model, task, seed=0)
        encoder.model.config.kdlora_task = task.to_dict()
        save_encoder(encoder, teacher)
    texts, to = write_rows(options.folder, f"texts-{count}", count), options.folder / f"labelled-{count}"
    start, seen, memory = time.perf_counter(), [], AnonymousMemory()

    def watch(done: int, total: int | None) -> None:
        seen.append(done)
        if time.perf_counter() - start > options.seconds:
            raise _TimeIsUpError

    finished = True
    try:
        label_collection(str(teacher), texts, to, progress=watch)
    except _TimeIsUpError:
        finished = False
    # A line fitted to the second half of the samples: by how much memory rises over the whole piece.
    half = memory.points[len(memory.points) // 2 :]
    rise = np.polyfit(range(len(half)), half, 1)[0] * len(memory.points)
    piece = {"finished": finished, "rows": seen[-1] - seen[0], "seconds": time.perf_counter() - start}
    file = options.folder / "pieces.json"
    pieces = [
        *(json.loads(file.read_text()) if file.exists() else []),
        piece | {"rise": rise, "peak": max(memory.points)},
    ]
    file.write_text(json.dumps(pieces, indent=2))
    rows, seconds = (sum(one[key] for one in pieces) for key in ("rows", "seconds"))
    print(f"{rows:,} rows in {len(pieces)} pieces, {seconds:.0f} s, {rows / seconds:,.0f} rows/s; finished: {finished}")
    print(f"memory at most {max(one['peak'] for one in pieces):.0f} MB; rise over each piece, fitted: ", end="")
    print(", ".join(f"{one['rise']:+.1f} MB" for one in pieces))


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        work = json.loads(sys.argv[1])
        print(json.dumps(prepare_once(Path(work["folder"]), work["model"])))
        sys.exit()
    parser = command_line(__doc__)
    parser.add_argument("part", choices=("prepare", "label"))
    parser.add_argument("--model", required=True, help="folder of a pretrained encoder")
    parser.add_argument("--rows", type=int, nargs="+")
    parser.add_argument("--folder", type=Path, help="of texts, model, collection and result of `label`")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop labelling after about so long")
    options = parser.parse_args()
    if options.part == "label" and options.folder is None:
        parser.error("label wants --folder")
    prepare(options) if options.part == "prepare" else label(options)
    tell_machine()
