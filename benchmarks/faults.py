"""Break kdlora for a long time: kill it in every stage, let processes fight for a folder, fuzz its readers.

    python benchmarks/faults.py kill  --out DIR --kills 50      # SIGKILL, SIGTERM, Ctrl-C at moments chosen by a seed
    python benchmarks/faults.py share --out DIR --rounds 20     # two processes on one folder, under load
    python benchmarks/faults.py fuzz  --out DIR --minutes 5     # needs: pip install atheris
    python benchmarks/faults.py summary --out DIR

Each part adds lines of JSON to `DIR/<part>.jsonl` and goes on where it stopped; `--seconds` bounds one call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / name) for name in ("", "faults")]  # tiny models, the driver

from faults_fuzz import fuzz
from faults_share import compete
from kill_driver import Attempt, Blow, differences, repeated_stages, run_command

import tiny
from experiments import Workshop

SIGNALS = (signal.SIGKILL,) * 5 + (signal.SIGTERM,) * 3 + (signal.SIGINT,) * 2
TRAINING = {"batch_size": 8, "learning_rate": 2e-3, "select": "best"}
TEXTS = 3_000
"""Without labels: so many that labelling them takes long enough to be struck."""
MOST_ATTEMPTS = 14
Line = dict[str, Any]


class Log:
    """The lines of JSON of one part."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def lines(self) -> list[Line]:
        """Read them; none where the file is missing."""
        text = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def add(self, line: Line) -> None:
        """Add one."""
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def build_workshop(folder: Path) -> Workshop:
    """Build tiny models and data, unless they are there."""
    if not (folder / "validation.csv").exists():
        folder.mkdir(parents=True, exist_ok=True)
        tiny.build_model_folder("bert", folder / "teacher")
        tiny.build_model_folder("distilbert", folder / "student", layers=1)
        tiny.write_csv(folder / "train.csv", tiny.sentiment_rows(64))
        texts = [f"{row['text']} {place}\n" for place, row in enumerate(tiny.sentiment_rows(TEXTS, seed=2))]
        (folder / "texts.txt").write_text("".join(texts), encoding="utf-8")
        tiny.write_csv(folder / "validation.csv", tiny.sentiment_rows(40, seed=1))
    return Workshop(folder / "teacher", folder / "student", folder / "train.csv", folder / "validation.csv")


def strike(options: argparse.Namespace, log: Log, workshop: Workshop) -> None:
    """Strike experiments until there were enough kills; each is finished and compared before the next begins."""
    config, right = options.out / "kill.yaml", options.out / "undisturbed"
    changes = {
        "data": {"unlabelled": str((options.out / "workshop" / "texts.txt").resolve())},
        "teacher": {"train": TRAINING | {"epochs": 60}},
        "student": {"train": TRAINING | {"epochs": 1}},
        "run": {"arms": ["kd-lora", "student-lora"], "checkpoint_seconds": 0.3},
        "export": {"formats": ["onnx", "onnx-int8"], "benchmark": False, "calibrate": True, "min_agreement": 0.0},
    }
    config.write_text(yaml.safe_dump(workshop.values(changes)), encoding="utf-8")
    timings = run_undisturbed(config, right, options.out / "timings.json")
    while time.monotonic() < options.until:
        done = log.lines()
        if sum(line["struck"] for line in done) >= options.kills and (not done or "differences" in done[-1]):
            return
        number = sum("differences" in line for line in done)
        folder = options.out / f"struck-{number}"
        earlier = [attempt_of(line) for line in done if line["round"] == number]
        hits = Counter(line["hit"] for line in done)
        blow = draw_blow(random.Random(f"{options.seed}-{len(done)}"), timings, earlier, hits)
        attempt = run_command(["run", str(config), "--out", str(folder)], blow)
        line: Line = {"round": number, "struck": attempt.struck is not None, "hit": attempt.hit}
        line |= {"signal": blow and blow.number.name, "victim": blow and blow.victim}
        line |= {"code": attempt.code, "ended": attempt.ended, "lost_seconds": attempt.lost_seconds()}
        if attempt.code == 0:
            line |= {"differences": differences(right, folder), "repeated": repeated_stages([*earlier, attempt])}
        log.add(line | {"attempt": dataclasses.asdict(attempt)})
        print(number, line["hit"], line["signal"], line["code"], line.get("differences", ""), flush=True)


def run_undisturbed(config: Path, folder: Path, timings: Path) -> dict[str, float]:
    """Run once without a blow; give the seconds of every stage, in order."""
    if not timings.exists():
        attempt = run_command(["run", str(config), "--out", str(folder)])
        if attempt.code != 0:
            raise SystemExit("\n".join(attempt.log))
        begins, ends = (
            {stage: seconds for seconds, kind, stage in attempt.events if kind == wanted} for wanted in ("begin", "end")
        )
        timings.write_text(json.dumps({stage: ends[stage] - begins[stage] for stage in begins}), encoding="utf-8")
    found: dict[str, float] = json.loads(timings.read_text(encoding="utf-8"))
    return found


def attempt_of(line: Line) -> Attempt:
    """Read an attempt of an earlier call."""
    values = line["attempt"]
    return Attempt(**values | {"events": [tuple(event) for event in values["events"]]})


def draw_blow(
    draw: random.Random, timings: dict[str, float], earlier: list[Attempt], hits: Counter[str | None]
) -> Blow | None:
    """Choose stage, moment, signal and victim of the next blow of a round; what was struck least comes first."""
    passed = {stage for attempt in earlier for _, kind, stage in attempt.events if kind == "end"}
    often = Counter(attempt.hit for attempt in earlier)
    stages = [stage for stage in timings if stage not in passed and often[stage] < 3]
    if not stages or len(earlier) >= MOST_ATTEMPTS:
        return None
    stage = draw.choices(stages, [(1.0 + hits[stage]) ** -2 for stage in stages])[0]
    victim = "child" if stage.startswith("train") and draw.random() < 0.2 else "command"
    number = signal.SIGKILL if victim == "child" else draw.choice(SIGNALS)
    return Blow(stage, draw.uniform(0.0, 0.9) * timings[stage], number=number, victim=victim)


def sum_up_kills(lines: list[Line]) -> list[str]:
    """Say what was struck, with what, and what differed."""
    struck = [line for line in lines if line["struck"]]
    rounds = [line for line in lines if "differences" in line]
    asked = [line for line in struck if line["signal"] in ("SIGTERM", "SIGINT")]
    stages = Counter(str(line["hit"]).rsplit(" seed", 1)[0] for line in struck if line["hit"])
    signals = Counter(line["signal"] + (" to the child" if line["victim"] == "child" else "") for line in struck)
    wrong = [line for line in rounds if line["differences"] or line["repeated"]]
    return [
        f"kills: {len(struck)}, of which {stages.total()} inside a stage; {len(rounds)} experiments finished after "
        f"them, {len(wrong)} with a difference, a leftover or a repeated stage",
        f"stages hit: {', '.join(f'{stage} {count}' for stage, count in stages.most_common())}",
        f"signals: {', '.join(f'{name} {count}' for name, count in signals.most_common())}",
        f"most training lost: {max((line['lost_seconds'] for line in struck), default=0.0):.1f} s",
        f"from SIGTERM or Ctrl-C to the end: {max((line['ended'] for line in asked), default=0.0):.1f} s at "
        f"most, exit status {sorted({line['code'] for line in asked})}",
    ]


def sum_up_meetings(lines: list[Line]) -> list[str]:
    """Say how often two processes met, and what went wrong."""
    wrong = [line["round"] for line in lines if line["differences"] or not line["fits"]]
    kinds = dict(Counter(line["kind"] for line in lines))
    return [f"rounds of two processes: {kinds}, wrong: {wrong or 'none'}"]


def sum_up_fuzzing(lines: list[Line]) -> list[str]:
    """Say how long which readers were fuzzed, and what was found."""
    seconds = sum(line["seconds"] for line in lines)
    findings = sorted({name for line in lines for name in line["findings"]})
    targets = ", ".join(sorted({line["target"] for line in lines}))
    tries = sum(int(line["said"].split()[1]) for line in lines if line["said"].startswith("Done "))
    return [f"fuzzing: {seconds:.0f} s and {tries:,} tries over {targets}; findings: {findings or 'none'}"]


PARTS = {"kill": (strike, sum_up_kills), "share": (compete, sum_up_meetings), "fuzz": (fuzz, sum_up_fuzzing)}


def main() -> None:
    """Run one part, and sum up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*PARTS, "summary"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of the work")
    parser.add_argument("--kills", type=int, default=50, help="kills in all, over every call")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of `share` in all")
    parser.add_argument("--minutes", type=float, default=5.0, help="of fuzzing, for each reader")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing new after so many seconds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job hands down that it is ignored
    options.until = time.monotonic() + options.seconds
    options.out.mkdir(parents=True, exist_ok=True)
    logs = {part: Log(options.out / f"{part}.jsonl") for part in PARTS}
    if options.part != "summary":
        PARTS[options.part][0](options, logs[options.part], build_workshop(options.out / "workshop"))
    for part, (_, sum_up) in PARTS.items():
        for line in sum_up(logs[part].lines()) if logs[part].lines() else ():
            print(f"- {line}")


if __name__ == "__main__":
    main()
