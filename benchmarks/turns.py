"""Two versions of kdlora side by side, in turns: is the new one slower anywhere?

    git worktree add ../old COMMIT
    python benchmarks/turns.py ../old . --models DIR --glue DIR [--rounds 3]

Only the command line is used, as both have it: `--help`, two arms of an experiment on CoLA, on MRPC and on texts of
about 300 tokens, labelling and predicting 16,000 texts. A whole run has start-up and all else in it. Of every
figure the best of the rounds counts; CPU seconds stand beside the clock's: they tell less of what else the
machine does.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import pandas as pd
import yaml
from harness import command_line, markdown, tell_machine

ROWS = {"cola": 2_000, "mrpc": 1_000, "long": 400}
TEXTS = 16_000
Figures = dict[str, list[float]]


def write_data(folder: Path, glue: Path) -> None:
    """Write the training rows of the three experiments, and the texts to label."""
    read = {"sep": "\t", "quoting": csv.QUOTE_NONE, "encoding": "utf-8-sig"}
    cola = pd.read_csv(glue / "CoLA/train.tsv", header=None, usecols=[1, 3], names=["label", "text"], **read)
    mrpc = pd.read_csv(glue / "MRPC/train.tsv", usecols=["Quality", "#1 String", "#2 String"], **read)
    mrpc.columns = pd.Index(["label", "text", "other"])
    joined = [" ".join(cola["text"][start : start + 30]) for start in range(ROWS["long"])]
    long = pd.DataFrame({"label": cola["label"][: ROWS["long"]], "text": joined})
    for name, table in (("cola", cola), ("mrpc", mrpc), ("long", long)):
        table["label"] = table["label"].map({0: "no", 1: "yes"})
        table.head(ROWS[name]).to_csv(folder / f"{name}.csv", index=False)
    texts = pd.concat([cola[["text"]]] * 2, ignore_index=True).head(TEXTS)
    texts.to_csv(folder / "texts.csv", index=False)


def write_config(folder: Path, name: str, models: Path) -> Path:
    """Write an experiment whose steps are the same in both versions."""
    train = {"epochs": 2, "learning_rate": 1e-4, "max_length": 384 if name == "long" else 128}
    config = {
        "task": {"text": ["text", "other"] if name == "mrpc" else ["text"], "label": "label", "kind": "single-label"},
        "data": {"train": str(folder / f"{name}.csv"), "augment": 0},
        "teacher": {"model": str(models / "minilm-l6"), "train": train},
        "student": {"model": str(models / "bert-tiny"), "train": train},
        "run": {"arms": ["fft", "kd-lora"], "seeds": [0], "precision": "fp32"},
        "export": {"formats": [], "benchmark": False},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def call(tree: Path, *arguments: object) -> tuple[float, float]:
    """Run a command of one version; give the clock's seconds and those of the CPU, children included."""
    environment = os.environ | {"PYTHONPATH": str(tree.resolve() / "src"), "HF_HUB_OFFLINE": "1"}
    before, start = os.times(), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "kdlora", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    wall, after = time.perf_counter() - start, os.times()
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(map(str, arguments))}\n{done.stderr[-2000:]}")
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, used


def measure(tree: Path, folder: Path, work: Path, figures: Figures) -> None:
    """Take every figure of one version once; seconds, less is better."""
    calls = {"--help": ("--help",)}
    for name in ROWS:
        calls[f"{name}: whole run"] = ("run", folder / f"{name}.yaml", "--out", work / name)
    calls["predict"] = ("predict", folder / "model" / "student", folder / "texts.csv", "--to", work / "said.csv")
    calls["label"] = (
        "label",
        folder / "model" / "teacher",
        folder / "texts.csv",
        "--to",
        work / "labelled",
        "--text",
        "text",
    )
    for name, arguments in calls.items():
        wall, used = call(tree, *arguments)
        figures[f"{name}, seconds"].append(wall)
        figures[f"{name}, CPU seconds"].append(used)
    for name in ROWS:
        for run in json.loads((work / name / "results.json").read_text(encoding="utf-8"))["runs"]:
            figures[f"{name}: training of {run['arm']}, seconds"].append(run["train_seconds"])


def main() -> None:
    """Measure both versions in turns, and print the table."""
    parser = command_line(__doc__, "models", "glue")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    sides: dict[Path, Figures] = {options.old: defaultdict(list), options.new: defaultdict(list)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder, options.glue)
        configs = [write_config(folder, name, options.models.resolve()) for name in ROWS]
        call(options.old, "run", configs[0], "--out", folder / "model")
        for number in range(options.rounds):
            for tree in list(sides)[:: -1 if number % 2 else 1]:
                work = folder / f"{number}-{list(sides).index(tree)}"
                work.mkdir()
                measure(tree, folder, work, sides[tree])
    tell_machine()
    old, new = ({name: min(values) for name, values in side.items()} for side in sides.values())
    rows = [(name, f"{old[name]:.2f}", f"{new[name]:.2f}", f"{new[name] / old[name]:.3f}") for name in old]
    print(markdown(("figure, best of the rounds", "old", "new", "new / old"), rows))


if __name__ == "__main__":
    main()
