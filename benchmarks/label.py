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
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdlora.data.tasks import DEFAULT_METRICS, Task
from kdlora.experiment.labelling import label_collection
from kdlora.models.encoders import load_encoder, save_encoder
from kdlora.system.environment import collect_versions, describe_machine, read_memory

_CHUNK_ROWS = 50_000
_POINTS = 12


def main() -> None:
    """Prepare, label, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a pretrained encoder; it gets a random head")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True, help="for texts, model, collection and result")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after about so long; call again to go on")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    model = _model(options.model, options.folder / "teacher")
    texts = _texts(options.model, options.rows, options.folder / f"texts-{options.rows}.parquet")
    piece = _label(str(model), texts, options)
    pieces = _keep(options.folder / f"pieces-{options.rows}.json", piece)
    print(json.dumps(piece, indent=2))
    if piece["finished"]:
        print(_summary(pieces, options.rows))


class _TimeIsUpError(Exception):
    """The piece has lasted long enough."""


def _label(model: str, texts: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Label until the end, or until the time is up."""
    start, levels, counted = time.perf_counter(), [], []

    def watch(done: int, total: int | None) -> None:
        level = read_memory()
        levels.append(0 if level is None else level.anonymous)
        counted.append(done)
        if time.perf_counter() - start > options.seconds:
            raise _TimeIsUpError

    finished = True
    try:
        label_collection(
            model,
            str(texts),
            options.folder / f"labelled-{options.rows}",
            precision="auto",
            device="cpu",
            progress=watch,
        )
    except _TimeIsUpError:
        finished = False
    seconds = time.perf_counter() - start
    chosen = np.unique(np.linspace(0, len(levels) - 1, _POINTS).astype(int)) if levels else []
    return {
        "finished": finished,
        "rows": counted[-1] - counted[0],
        "seconds": round(seconds, 1),
        "rows_per_second": round((counted[-1] - counted[0]) / seconds),
        "anonymous_mb": [[counted[point], round(levels[point] / 2**20, 1)] for point in chosen],
        "rise_mb": round(_rise(counted, levels) / 2**20, 2),
        "machine": describe_machine(),
        "versions": collect_versions(),
    }


def _rise(counted: list[int], levels: list[int]) -> float:
    """Fit a line to the second half of the windows: bytes by which memory rises over as many rows as were labelled."""
    half = len(levels) // 2
    if len(levels) - half < 3:
        return 0.0
    slope = float(np.polyfit(counted[half:], levels[half:], 1)[0])
    return slope * (counted[-1] - counted[0])


def _keep(file: Path, piece: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a piece to those before."""
    pieces = json.loads(file.read_text()) if file.exists() else []
    pieces = [*pieces, piece] if piece["rows"] else pieces
    file.write_text(json.dumps(pieces, indent=2))
    return pieces


def _summary(pieces: list[dict[str, Any]], rows: int) -> str:
    seconds = sum(piece["seconds"] for piece in pieces)
    highest = max(level for piece in pieces for _, level in piece["anonymous_mb"])
    rises = ", ".join(f"{piece['rise_mb']:+.1f}" for piece in pieces)
    return (
        f"{rows:,} rows in {len(pieces)} pieces, {seconds:.0f} s, {rows / seconds:,.0f} rows/s; anonymous memory at "
        f"most {highest:.0f} MiB; fitted rise over each piece: {rises} MiB"
    )


def _model(source: str, folder: Path) -> Path:
    """Give an encoder a head, once."""
    if not folder.exists():
        task = Task("single-label", ("text",), ("label",), ("negative", "positive"), DEFAULT_METRICS["single-label"])
        encoder = load_encoder(source, task, seed=0)
        encoder.model.config.kdlora_task = task.to_dict()
        save_encoder(encoder, folder)
    return folder


def _texts(source: str, rows: int, file: Path) -> Path:
    """Write made-up texts, once."""
    if file.exists():
        return file
    from transformers import AutoTokenizer

    vocabulary = AutoTokenizer.from_pretrained(source).get_vocab()
    words = np.array(sorted(word for word in vocabulary if word.isalpha() and len(word) > 2))
    draw = np.random.default_rng(0)
    temporary = file.with_suffix(".part")
    schema = pa.schema([("id", pa.string()), ("text", pa.string())])
    with pq.ParquetWriter(temporary, schema) as writer:
        for start in range(0, rows, _CHUNK_ROWS):
            count = min(_CHUNK_ROWS, rows - start)
            texts = [" ".join(draw.choice(words, size)) for size in draw.integers(6, 15, count)]
            ids = [f"row-{number}" for number in range(start, start + count)]
            writer.write_table(pa.table({"id": ids, "text": texts}, schema))
    temporary.replace(file)
    return file


if __name__ == "__main__":
    main()
