"""Two processes on one folder, under load: one works, the other waits or is told; the results are as if alone."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from kill_driver import differences, run_command

LABEL = """
import sys
import numpy as np
from kdlora import load_encoder, load_splits, teacher_logits
from kdlora.config import DataConfig, TaskConfig
model, data, folder, to = sys.argv[1:]
splits = load_splits(TaskConfig(), DataConfig(train=data))
encoder = load_encoder(model, splits.task, seed=0)
found = teacher_logits(encoder, [0, 1], splits.train, splits.task, folder, max_length=32, rows_per_shard=4)
np.save(to, found.logits)
"""


def compete(options: argparse.Namespace, log: Any, workshop: Any) -> None:
    """Let two processes meet on a folder, in turns on an experiment's and on teacher logits."""
    out: Path = options.out
    config, alone = out / "share.yaml", out / "share-alone"
    config.write_text(yaml.safe_dump(workshop.values({"run": {"arms": ["kd-lora"]}})), encoding="utf-8")
    if not (alone / "report.html").exists() and run_command(["run", str(config), "--out", str(alone)]).code:
        raise SystemExit("the experiment failed alone")
    while (number := len(log.lines())) < options.rounds and time.monotonic() < options.until:
        draw, folder = random.Random(f"{options.seed}-{number}"), out / f"shared-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as load:
            try:
                if number % 2 == 0:
                    line = {"kind": "experiment", **meet_in_experiment(draw, folder, config, alone)}
                else:
                    line = {"kind": "logits", **meet_in_logits(draw, folder, workshop, out)}
            finally:
                load.kill()
        log.add({"round": number, **line})
        print(number, line, flush=True)


def meet_in_experiment(draw: random.Random, folder: Path, config: Path, alone: Path) -> dict[str, object]:
    """Start one command twice; the second is told who works, or comes late and finds all done."""
    command = ["-m", "kdlora", "run", str(config), "--out", str(folder)]
    first = start(command)
    time.sleep(draw.uniform(0.0, 3.0))
    second = start(command)
    said = [process.communicate(timeout=300)[1] for process in (first, second)]
    codes = [process.returncode for process in (first, second)]
    told = [f"process {other.pid} on" in text for other, text in zip((second, first), said, strict=True)]
    fits = 0 in codes and all(code == 0 or (code == 2 and named) for code, named in zip(codes, told, strict=True))
    return {"codes": codes, "fits": fits, "differences": differences(alone, folder)}


def meet_in_logits(draw: random.Random, folder: Path, workshop: Any, out: Path) -> dict[str, object]:
    """Let two processes label one folder, and kill the first of them in every second round."""

    def label(to: Path, name: str) -> subprocess.Popen[str]:
        return start(["-c", LABEL, str(workshop.teacher), str(workshop.train), str(to), str(out / name)])

    kills = draw.random() < 0.5
    processes = [label(folder, f"logits-{who}.npy") for who in range(2)]
    if kills:
        while not list(folder.glob("logits-*.parquet")) and processes[0].poll() is None:
            time.sleep(0.002)
        processes[0].kill()
    for process in processes:
        process.communicate(timeout=300)
    codes = [process.returncode for process in processes]
    last = np.load(out / "logits-1.npy")
    if not (out / "logits-alone.npy").exists():
        label(out / "logits-alone", "logits-alone.npy").communicate(timeout=300)
    same = np.array_equal(np.load(out / "logits-alone.npy"), last)
    leftovers = [path.name for path in folder.iterdir() if ".tmp-" in path.name]
    fits = codes[1] == 0 and (codes[0] == 0 or kills)
    return {"codes": codes, "fits": fits, "differences": ([] if same else ["logits"]) + leftovers}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start Python in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
