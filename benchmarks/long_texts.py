"""What windows gain where the label is at the end of a text: cut against windows, in the teacher and in the student.

    python benchmarks/long_texts.py --data GLUE --models DIR --out OUT [--rows 600] [--length 32]

A text is some sentences of news (MRPC) and then a labelled sentence of a film review (SST-2). Four teachers
(`minilm-l6`) learn from the same rows: one reads a text whole, the others cut it at `--length`, or have windows of that
length. Then students (`bert-tiny`) of that length learn from the first. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path
from typing import Any

from harness import command_line, markdown, pair_up, tell_machine

from kdlora.configfile import build_config
from kdlora.data.tasks import Task
from kdlora.evidence.predictions import Predictions, read_predictions
from kdlora.evidence.stats import contrast
from kdlora.experiment.run import ExperimentResult, run_experiment

WAYS: dict[str, dict[str, Any]] = {
    "cut": {},
    "windows, mean": {"long_texts": "windows"},
    "windows, max": {"long_texts": "windows", "window_pool": "max"},
}
FILLERS, LEAST_WORDS, WHOLE = 2, 6, 160
ROWS = {"validation": 100, "test": 872}


def read_tsv(path: Path, column: str) -> list[dict[str, str]]:
    """Read the rows of a file of GLUE that have a text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row.get(column)]


def write_rows(glue: Path, folder: Path, train: int) -> dict[str, str]:
    """Put labelled sentences behind others: training and validation rows from the training files."""
    draw = random.Random(0)
    own = [row for row in read_tsv(glue / "SST-2/train.tsv", "sentence") if row["sentence"].count(" ") >= LEAST_WORDS]
    draw.shuffle(own)
    parts = {"train": own[:train], "validation": own[train : train + ROWS["validation"]]}
    parts["test"] = read_tsv(glue / "SST-2/dev.tsv", "sentence")[: ROWS["test"]]
    news = {name: read_tsv(glue / f"MRPC/{name}.tsv", "#1 String") for name in ("train", "test")}
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for name, rows in parts.items():
        files[name] = str(folder / f"{name}.csv")
        with Path(files[name]).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for row in rows:
                before = draw.sample(news["test" if name == "test" else "train"], FILLERS)
                text = " ".join([*(one["#1 String"].strip() for one in before), row["sentence"].strip()])
                writer.writerow([text, ("negative", "positive")[int(row["label"])]])
    return files


def experiment(options: argparse.Namespace, name: str, sections: dict[str, dict[str, Any]]) -> ExperimentResult:
    """Run one, which is not repeated."""
    usual = {"task": {"text": "text", "label": "label"}, "export": {"formats": [], "benchmark": False}}
    return run_experiment(build_config({"name": name, **usual, **sections}), options.out / name)


def train_teacher(options: argparse.Namespace, files: dict[str, str], name: str) -> ExperimentResult:
    """Train a teacher that reads texts whole, or in one of the ways."""
    train = {"epochs": options.epochs, "max_length": WHOLE if name == "whole" else options.length}
    sections = {
        "data": files | WAYS.get(name, {}),
        "teacher": {"model": str(options.models / "minilm-l6"), "train": train},
        "run": {"arms": ["fft"], "seeds": [0]},
    }
    return experiment(options, f"teacher-{name.replace(', ', '-')}", sections)


def train_students(options: argparse.Namespace, files: dict[str, str], teacher: Path) -> dict[str, ExperimentResult]:
    """Train students on what the teacher says that reads texts whole."""
    found, train = {}, {"epochs": 12, "max_length": options.length}
    for name, way in WAYS.items():
        sections = {
            "data": files | way | {"augment": 0},
            "teacher": {"fine_tuned": str(teacher), "train": {"max_length": WHOLE}},
            "student": {"model": str(options.models / "bert-tiny"), "train": train},
            "run": {"arms": ["kd-lora"], "seeds": options.seeds},
        }
        found[name] = experiment(options, f"student-{name.replace(', ', '-')}", sections)
    return found


def predictions(result: ExperimentResult, arm: str) -> dict[int, Predictions]:
    """Read what an arm said of the test rows, by seed."""
    records = [one for one in result.records if one.arm == arm]
    return {one.seed: read_predictions(result.layout.run(arm, one.seed).predictions).only("test") for one in records}


def line(name: str, result: ExperimentResult, arm: str, base: ExperimentResult) -> list[str]:
    """Give the row of a table: score, what it is above `cut`, training seconds."""
    records = [one for one in result.records if one.arm == arm]
    scores, seconds = ([getattr(one, key) for one in records] for key in ("test_score", "train_seconds"))
    cells = [name, arm, f"{sum(scores) / len(scores):.1f} ({min(scores):.1f} to {max(scores):.1f})"]
    pair = pair_up(Task.from_dict(records[0].task), predictions(result, arm), predictions(base, arm))
    gain = "–" if result is base or pair is None else contrast([pair])
    told = gain if isinstance(gain, str) else f"{gain.difference:+.1f} ({gain.low:+.1f} to {gain.high:+.1f})"
    return [*cells, told, f"{sum(seconds) / len(seconds):.0f}"]


def main() -> None:
    """Make the rows, train, and print the tables."""
    parser = command_line(__doc__, "data", "models", "out")
    parser.add_argument("--rows", type=int, default=600, help="training rows")
    parser.add_argument("--length", type=int, default=32, help="tokens at which texts are cut, or of a window")
    parser.add_argument("--epochs", type=int, default=4, help="of the teachers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the students")
    options = parser.parse_args()
    files = write_rows(options.data, options.out / "rows", options.rows)
    whole = train_teacher(options, files, "whole")
    students = train_students(options, files, whole.layout.teacher)
    teachers = {"whole": whole} | {name: train_teacher(options, files, name) for name in WAYS}
    tell_machine()
    header = ["texts", "arm", "test accuracy", f"above cut at {options.length}", "seconds"]
    rows = [line(name, one, "fft", teachers["cut"]) for name, one in teachers.items()]
    rows += [line(name, one, "kd-lora", students["cut"]) for name, one in students.items()]
    print(markdown(header, rows, texts=2))


if __name__ == "__main__":
    main()
