"""Fuzz the readers of configs and data, each in a process of its own, for a bounded time."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from faults_workshop import append, read_lines

TARGETS = ("config", "override", "csv", "tsv", "jsonl", "parquet", "table")


def fuzz(out: Path, *, minutes: float, seed: int, until: float) -> None:
    """Fuzz every reader that has not had its minutes.

    Args:
        out: folder of the results; the corpora stay there, so that a later call goes on from them.
        minutes: for each reader, over every call.
        seed: of the fuzzer.
        until: by the monotonic clock; nothing new begins after it.
    """
    if importlib.util.find_spec("atheris") is None:
        raise SystemExit("the fuzzer needs atheris: pip install atheris (Linux or macOS, x86-64 or Arm)")
    for target in TARGETS:
        calls = [line["seconds"] for line in read_lines(out / "fuzz.jsonl") if line["target"] == target]
        left = 60 * minutes - sum(calls)
        if left < 1 or time.monotonic() > until:
            continue
        corpus, findings = out / "corpus" / target, out / "findings" / target
        for folder in (corpus, findings):
            folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "faults_fuzz_target.py"), target, str(corpus),
             f"-max_total_time={int(left)}", f"-seed={seed + 1 + len(calls)}", "-rss_limit_mb=4096", "-timeout=30",
             f"-artifact_prefix={findings}/", "-max_len=4096"],
            capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        tries = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        found = sorted(path.name for path in findings.iterdir())
        line = {"target": target, "seconds": time.monotonic() - begin, "code": done.returncode, "findings": found}
        append(out / "fuzz.jsonl", line | {"said": tries[-1] if tries else done.stderr[-3000:]})
        print(line, flush=True)
