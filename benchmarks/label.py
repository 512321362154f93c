"""Label a million short rows with a small encoder, and watch the memory.

    python benchmarks/label.py --model MODEL --rows 1000000 --folder /tmp/label

The texts are made up (6 to 14 words from the model's own vocabulary, by a seed) and written once, as Parquet. A killed
call goes on where it stopped, as `kdlora label` does: give the same command again until it prints the result. Anonymous
memory is read after every window; each piece reports its own, so that a fresh process does not hide a slow rise.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from harness import command_line, tell_machine
from transformers import AutoTokenizer

from kdlora import label_collection, load_encoder
from kdlora.data.tasks import DEFAULT_METRICS, Task
from kdlora.models.encoders import save_encoder
from kdlora.system.environment import read_memory


class _TimeIsUpError(Exception):
    """The piece has lasted long enough."""


def label(options: argparse.Namespace, texts: Path) -> dict[str, Any]:
    """Label until the end, or until the time is up."""
    start, points = time.perf_counter(), []

    def watch(done: int, total: int | None) -> None:
        level = read_memory()
        points.append((done, level.anonymous / 2**20 if level else 0.0))
        if time.perf_counter() - start > options.seconds:
            raise _TimeIsUpError

    to, finished = options.folder / f"labelled-{options.rows}", True
    try:
        label_collection(
            str(options.folder / "teacher"), str(texts), to, precision="auto", device="cpu", progress=watch
        )
    except _TimeIsUpError:
        finished = False
    counted, levels = np.array(points).T
    rows, half = int(counted[-1] - counted[0]), len(points) // 2
    # A line fitted to the second half of the windows: by how much memory rises over as many rows as were labelled.
    rise = np.polyfit(counted[half:], levels[half:], 1)[0] * rows if len(points) - half > 2 else 0.0
    seconds = time.perf_counter() - start
    return {"finished": finished, "rows": rows, "seconds": seconds, "most_mib": levels.max(), "rise_mib": rise}


def make_model(source: str, folder: Path) -> None:
    """Give an encoder a head, once."""
    if not folder.exists():
        task = Task("single-label", ("text",), ("label",), ("negative", "positive"), DEFAULT_METRICS["single-label"])
        encoder = load_encoder(source, task, seed=0)
        encoder.model.config.kdlora_task = task.to_dict()
        save_encoder(encoder, folder)


def make_texts(source: str, rows: int, file: Path) -> Path:
    """Write made-up texts, once."""
    if not file.exists():
        vocabulary = AutoTokenizer.from_pretrained(source).get_vocab()
        words = np.array(sorted(word for word in vocabulary if word.isalpha() and len(word) > 2))
        draw = np.random.default_rng(0)
        texts = [" ".join(draw.choice(words, size)) for size in draw.integers(6, 15, rows)]
        ids = [f"row-{number}" for number in range(rows)]
        pd.DataFrame({"id": ids, "text": texts}).to_parquet(file.with_suffix(".part"), row_group_size=50_000)
        file.with_suffix(".part").replace(file)
    return file


def main(options: argparse.Namespace) -> None:
    """Prepare, label, report."""
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    make_model(options.model, options.folder / "teacher")
    texts = make_texts(options.model, options.rows, options.folder / f"texts-{options.rows}.parquet")
    piece, file = label(options, texts), options.folder / f"pieces-{options.rows}.json"
    pieces = [*(json.loads(file.read_text()) if file.exists() else []), piece]
    file.write_text(json.dumps(pieces, indent=2))
    seconds = sum(one["seconds"] for one in pieces)
    print(f"{len(pieces)} pieces, the last one {'finished' if piece['finished'] else 'not finished'}; {seconds:.0f} s")
    print(f"{sum(one['rows'] for one in pieces) / seconds:,.0f} rows/s")
    print(f"anonymous memory at most {max(one['most_mib'] for one in pieces):.0f} MiB")
    print("fitted rise over each piece, MiB:", ", ".join(f"{one['rise_mib']:+.1f}" for one in pieces))
    tell_machine()


if __name__ == "__main__":
    parser = command_line(__doc__, "folder")
    parser.add_argument("--model", required=True, help="a pretrained encoder; it gets a random head")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after about so long; call again to go on")
    main(parser.parse_args())
