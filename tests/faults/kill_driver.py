"""Start the real command line, strike it at a chosen moment of a chosen stage, and say from its log what was hit."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from kdlora.evidence.predictions import read_predictions
from kdlora.evidence.records import ExperimentLayout, read_record
from kdlora.system.integrity import hash_files

_LINE = re.compile(r"(begin|end) (\w+) ([\w-]+) seed (\d+)$")
_CHECKPOINT = re.compile(r"checkpoint at step (\d+)$")
SAME = (
    *("score", "metrics", "test_score", "test_metrics", "best_epoch", "history"),
    *("fingerprints", "trainable_parameters"),
)
KINDS = ("*.safetensors", "tokenizer.json", "*.onnx", "logits-*.parquet", "config.json")
"""Weights, tokenizers, exports and stored logits, which are compared byte by byte."""


@dataclass(frozen=True)
class Blow:
    """When to strike, and with what: seconds after a stage began, or after it wrote so many checkpoints."""

    stage: str  # as the log names it, such as `train fft seed 0`
    delay: float = 0.0
    checkpoints: int = 0
    number: signal.Signals = signal.SIGKILL
    victim: str = "command"  # or `child`: the process that the stage runs in


@dataclass
class Attempt:
    """One call of the command; times are seconds since its start."""

    code: int = 0  # minus the signal's number where it was killed
    events: list[tuple[float, str, str]] = field(default_factory=list)  # time, `begin` or `end`, stage
    checkpoints: list[tuple[float, int]] = field(default_factory=list)  # time, step
    log: list[str] = field(default_factory=list)
    struck: float | None = None  # None where the stage did not come
    ended: float = 0.0  # after the signal

    @property
    def hit(self) -> str | None:
        """The stage that had begun and not ended when the signal came, by the log; None outside of any."""
        if self.struck is None:
            return None
        open_stages: list[str] = []
        for _, kind, stage in self.events:
            if kind == "begin":
                open_stages.append(stage)
            elif stage in open_stages:
                open_stages.remove(stage)
        return open_stages[-1] if open_stages else None

    def note(self, now: float, text: str) -> None:
        """Take a line of the log."""
        self.log.append(text)
        if found := _LINE.search(text):
            self.events.append((now, found[1], f"{found[2]} {found[3]} seed {found[4]}"))
        elif found := _CHECKPOINT.search(text):
            self.checkpoints.append((now, int(found[1])))

    def has_reached(self, blow: Blow) -> bool:
        """Say whether it is time to strike."""
        begins = [seconds for seconds, *event in self.events if event == ["begin", blow.stage]]
        return bool(begins) and sum(seconds > begins[-1] for seconds, _ in self.checkpoints) >= blow.checkpoints

    def lost_seconds(self) -> float:
        """Seconds of training since the last checkpoint, or since the begin of the training that was struck."""
        if self.struck is None or not (self.hit or "").startswith("train"):
            return 0.0
        begin = max(seconds for seconds, kind, stage in self.events if kind == "begin" and stage == self.hit)
        return self.struck - max([begin, *(seconds for seconds, _ in self.checkpoints)])


def run_command(arguments: Sequence[str], blow: Blow | None = None, *, limit: float = 300.0) -> Attempt:
    """Call `kdlora`, and strike it."""
    attempt, begin, reached = Attempt(), time.monotonic(), threading.Event()
    environment = os.environ | {"KDLORA_LOG": "INFO", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kdlora", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
    )

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            attempt.note(time.monotonic() - begin, line.rstrip("\n"))
            if blow is not None and attempt.has_reached(blow):
                reached.set()
        reached.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        if blow is not None and reached.wait(limit):
            time.sleep(blow.delay)
            victim = process.pid if blow.victim == "command" else youngest_descendant(process.pid)
            if process.poll() is None and victim is not None:
                attempt.struck = time.monotonic() - begin
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim, blow.number)
        attempt.code = process.wait(limit)
        attempt.ended = time.monotonic() - begin - (attempt.struck or 0.0)
    finally:
        process.kill()
        reader.join(10)
        if process.stderr is not None and not reader.is_alive():
            process.stderr.close()
    return attempt


def youngest_descendant(process: int) -> int | None:
    """Find the process that a stage runs in, the last one to be started."""
    descendants = psutil.Process(process).children(recursive=True)
    return max(descendants, key=psutil.Process.create_time).pid if descendants else None


def differences(undisturbed: Path, other: Path) -> list[str]:
    """Say what differs in records, predictions and weights, bit for bit, and what was left; times and memory may."""
    found = [f"left behind: {path}" for path in other.rglob("*") if ".tmp-" in path.name or path.name == "checkpoints"]
    right, left = ExperimentLayout(undisturbed), ExperimentLayout(other)
    runs = sorted(path.parent.name for path in right.runs.glob("*/run.json"))
    if runs != sorted(path.parent.name for path in left.runs.glob("*/run.json")):
        return [*found, "other runs"]
    for name in runs:
        one, two = (read_record(layout.runs / name / "run.json") for layout in (right, left))
        found += [f"{name}: {key}" for key in SAME if getattr(one, key) != getattr(two, key)]
        first, second = (read_predictions(layout.runs / name / "predictions.parquet") for layout in (right, left))
        if first.ids != second.ids or not np.array_equal(first.logits, second.logits):
            found.append(f"{name}: predictions")
    folders = (undisturbed, other)
    one, two = (hash_files(place, [path for kind in KINDS for path in place.rglob(kind)]) for place in folders)
    return found + [f"{name} differs" for name in sorted(one.keys() | two.keys()) if one.get(name) != two.get(name)]


def repeated_stages(attempts: Sequence[Attempt]) -> list[str]:
    """List what was done again though it was finished: runs with a record, shards with teacher logits."""
    finished: set[str] = set()
    found: list[str] = []
    for attempt in attempts:
        for _, kind, stage in attempt.events:
            name, run = stage.split(" ", 1)
            if name in ("train", "merge", "evaluate") and run in finished and kind == "begin":
                found.append(stage)
        last = [stage for _, kind, stage in attempt.events if kind == "end" and stage.startswith("evaluate")]
        later = [stage for _, kind, stage in attempt.events if kind == "begin"]
        # A run has its record when the next stage has begun.
        finished |= {stage.split(" ", 1)[1] for stage in last if later and later[-1] != stage}
    missing = {stage for attempt in attempts for _, _, stage in attempt.events if stage.startswith("label")}
    for attempt in attempts:
        if not missing:
            found += [line for line in attempt.log if re.match(r"[1-9]\d* of \d+ shards", line)]
        missing -= {stage for _, kind, stage in attempt.events if kind == "end"}
    return found
