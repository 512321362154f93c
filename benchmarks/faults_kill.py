"""Kill the real command line at moments chosen by a seed, start it again, and compare with an undisturbed run."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from faults_workshop import append, build_workshop, read_lines
from kill_driver import Attempt, Blow, differences, repeated_stages, run_command

SIGNALS = (signal.SIGKILL,) * 5 + (signal.SIGTERM,) * 3 + (signal.SIGINT,) * 2
TRAINING = {"epochs": 30, "batch_size": 8, "learning_rate": 2e-3, "select": "best"}
MOST_ATTEMPTS = 14


def strike(out: Path, *, kills: int, seed: int, until: float) -> None:
    """Strike experiments until there were enough kills; each is finished and compared before the next begins.

    Args:
        out: folder of the results.
        kills: in all, those of earlier calls included.
        seed: of stages, moments and signals.
        until: by the monotonic clock; nothing new begins after it.
    """
    config = _write_config(out)
    right = out / "undisturbed"
    timings = _run_undisturbed(config, right, out / "timings.json")
    results = out / "kill.jsonl"
    while time.monotonic() < until:
        done = read_lines(results)
        struck = sum(line["struck"] for line in done)
        rounds = [line["round"] for line in done if "differences" in line]
        if struck >= kills and (not done or "differences" in done[-1]):
            return
        number = len(rounds)
        _continue_round(config, right, out, number, random.Random(f"{seed}-{len(done)}"), timings, results, until)


def _continue_round(
    config: Path,
    right: Path,
    out: Path,
    number: int,
    draw: random.Random,
    timings: dict[str, float],
    results: Path,
    until: float,
) -> None:
    """Make the next attempt of a round, and judge the round when its experiment has finished."""
    folder = out / f"struck-{number}"
    done = read_lines(results)
    hits = Counter(line["hit"] for line in done)  # what was struck least comes first
    earlier = [_attempt_of(line) for line in done if line["round"] == number]
    passed = {stage for attempt in earlier for _, kind, stage in attempt.events if kind == "end"}
    often = Counter(attempt.hit for attempt in earlier)
    open_stages = [stage for stage in timings if stage not in passed and often[stage] < 3]
    blow = None
    if open_stages and len(earlier) < MOST_ATTEMPTS:
        stage = draw.choices(open_stages, [(1.0 + hits[stage]) ** -2 for stage in open_stages])[0]
        victim = "child" if stage.startswith("train") and draw.random() < 0.2 else "command"
        number_of_signal = signal.SIGKILL if victim == "child" else draw.choice(SIGNALS)
        blow = Blow(stage, draw.uniform(0.0, 0.9) * timings[stage], number=number_of_signal, victim=victim)
    attempt = run_command(["run", str(config), "--out", str(folder)], blow)
    line: dict[str, Any] = {"round": number, "struck": attempt.struck is not None, "hit": attempt.hit}
    line |= {"signal": None if blow is None else blow.number.name, "victim": None if blow is None else blow.victim}
    line |= {"code": attempt.code, "ended": attempt.ended, "lost_seconds": attempt.lost_seconds()}
    line |= {"attempt": dataclasses.asdict(attempt)}
    if attempt.code == 0:
        line |= {"differences": differences(right, folder), "repeated": repeated_stages([*earlier, attempt])}
    append(results, line)
    print(line["round"], line["hit"], line["signal"], line["code"], line.get("differences", ""), flush=True)


def _attempt_of(line: dict[str, Any]) -> Attempt:
    values = line["attempt"]
    return Attempt(**values | {"events": [tuple(event) for event in values["events"]]})


def _write_config(out: Path) -> Path:
    """Describe an experiment with every kind of stage."""
    workshop = build_workshop(out / "workshop")
    values = workshop.values(
        {
            "teacher": {"train": TRAINING},
            "student": {"train": TRAINING},
            "run": {"arms": ["kd-lora", "student-lora"], "checkpoint_seconds": 0.3},
            "export": {"formats": ["onnx", "onnx-int8"], "benchmark": False, "calibrate": True, "min_agreement": 0.0},
        }
    )
    path = out / "kill.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def _run_undisturbed(config: Path, folder: Path, timings: Path) -> dict[str, float]:
    """Run once without a blow; give the seconds of every stage, in order."""
    if not timings.exists():
        attempt = run_command(["run", str(config), "--out", str(folder)])
        if attempt.code != 0:
            raise SystemExit("\n".join(attempt.log))
        begins = {stage: seconds for seconds, kind, stage in attempt.events if kind == "begin"}
        ends = {stage: seconds for seconds, kind, stage in attempt.events if kind == "end"}
        timings.write_text(json.dumps({stage: ends[stage] - begins[stage] for stage in begins}), encoding="utf-8")
    found: dict[str, float] = json.loads(timings.read_text(encoding="utf-8"))
    return found
