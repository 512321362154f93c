"""What the benchmarks share: command line, processes, paired predictions, Markdown tables, the name of the machine."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions
from kdlora.evidence.stats import PairedArms
from kdlora.report.findings import align
from kdlora.system.environment import collect_versions, describe_machine


def command_line(text: str | None, *places: str) -> argparse.ArgumentParser:
    """Make a parser whose help is a file's docstring; each place is a required option that names a folder."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in places:
        parser.add_argument(f"--{name}", type=Path, required=True)
    return parser


def in_process(script: str | Path, work: dict[str, Any], **environment: str) -> dict[str, Any]:
    """Run a script with its work as JSON, and read the JSON of its last line."""
    command = [sys.executable, str(script), json.dumps(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment or None)
    if done.returncode:
        sys.exit(f"{Path(script).name} failed with {work}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], texts: int = 1) -> str:
    """Write a table; the first columns are text, the others figures."""
    rule = ["---" if column < texts else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (header, rule, *rows))


def tell_machine() -> None:
    """Print machine and versions, without which no figure is worth anything."""
    print(json.dumps({"machine": describe_machine(), "versions": collect_versions()}))


def pair_up(task: Task, first: Mapping[int, Predictions], second: Mapping[int, Predictions]) -> PairedArms | None:
    """Bring two sides together, seed by seed and row by row; None where no seed is on both."""
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    aligned = align([side[seed] for side in (first, second) for seed in seeds])
    if aligned is None or aligned[0].labels is None:
        raise SystemExit("two sides of a contrast have other rows")
    logits = [one.decided for one in aligned]
    return PairedArms(task, aligned[0].labels, logits[: len(seeds)], logits[len(seeds) :], offsets=aligned[0].offsets)
