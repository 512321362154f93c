"""Two processes on one folder, under load: one works, the other waits or is told; the results are as if alone."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml
from faults_workshop import append, build_workshop, read_lines
from kill_driver import differences, run_command

LABEL = """
import sys
from pathlib import Path
import numpy as np
from kdlora.config import DataConfig, TaskConfig
from kdlora.data.load import load_splits
from kdlora.distil.teacher import teacher_logits
from kdlora.models.encoders import load_encoder
model, data, folder, to = sys.argv[1:]
splits = load_splits(TaskConfig(), DataConfig(train=data))
encoder = load_encoder(model, splits.task, seed=0)
found = teacher_logits(encoder, [0, 1], splits.train, splits.task, folder, max_length=32, rows_per_shard=4)
np.save(to, found.logits)
"""


def compete(out: Path, *, rounds: int, seed: int, until: float) -> None:
    """Let two processes meet on a folder, in turns on an experiment's and on teacher logits.

    Args:
        out: folder of the results.
        rounds: in all, those of earlier calls included.
        seed: of the moments.
        until: by the monotonic clock; nothing new begins after it.
    """
    results = out / "share.jsonl"
    workshop = build_workshop(out / "workshop")
    config = out / "share.yaml"
    config.write_text(yaml.safe_dump(workshop.values({"run": {"arms": ["kd-lora"]}})), encoding="utf-8")
    alone = out / "share-alone"
    if not (alone / "report.html").exists() and run_command(["run", str(config), "--out", str(alone)]).code:
        raise SystemExit("the experiment failed alone")
    while (number := len(read_lines(results))) < rounds and time.monotonic() < until:
        draw, folder = random.Random(f"{seed}-{number}"), out / f"shared-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        with _load():
            one = _meet_in_experiment if number % 2 == 0 else _meet_in_logits
            line = one(draw, folder, config, alone, out)
        append(results, {"round": number, "kind": one.__name__.removeprefix("_meet_in_"), **line})
        print(number, line, flush=True)


def _meet_in_experiment(draw: random.Random, folder: Path, config: Path, alone: Path, out: Path) -> dict[str, object]:
    """Start one command twice; the second is told who works, or comes late and finds all done."""
    command = [sys.executable, "-m", "kdlora", "run", str(config), "--out", str(folder)]
    first = _start(command)
    time.sleep(draw.uniform(0.0, 3.0))
    second = _start(command)
    said = [process.communicate(timeout=300)[1] for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    told = [f"process {other.pid} on" in text for other, text in zip((second, first), said, strict=True)]
    fits = 0 in codes and all(code == 0 or (code == 2 and named) for code, named in zip(codes, told, strict=True))
    return {"codes": codes, "fits": fits, "differences": differences(alone, folder)}


def _meet_in_logits(draw: random.Random, folder: Path, config: Path, alone: Path, out: Path) -> dict[str, object]:
    """Let two processes label one folder, and kill the first of them in every second round."""
    workshop = out / "workshop"
    kills = draw.random() < 0.5
    processes = [
        _start([sys.executable, "-c", LABEL, str(workshop / "teacher"), str(workshop / "train.csv"), *places])
        for places in ((str(folder), str(out / f"logits-{who}.npy")) for who in range(2))
    ]
    if kills:
        while not list(folder.glob("logits-*.parquet")) and processes[0].poll() is None:
            time.sleep(0.002)
        processes[0].kill()
    for process in processes:
        process.communicate(timeout=300)
    codes = [process.returncode for process in processes]
    reference = out / "logits-alone.npy"
    last = np.load(out / "logits-1.npy")
    if not reference.exists():
        lone = _start([sys.executable, "-c", LABEL, str(workshop / "teacher"), str(workshop / "train.csv"),
                       str(out / "logits-alone"), str(reference)])  # fmt: skip
        lone.communicate(timeout=300)
    same = bool(np.array_equal(np.load(reference), last))
    leftovers = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    fits = codes[1] == 0 and (codes[0] == 0 or kills)
    return {"codes": codes, "fits": fits, "differences": ([] if same else ["logits"]) + leftovers}


def _start(command: list[str]) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


@contextlib.contextmanager
def _load() -> Iterator[None]:
    """Keep a core busy."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            yield
        finally:
            busy.kill()
