"""What a small language model is worth as teacher: prompted, against labels by people; tuned, against an encoder.

    python benchmarks/llm_teacher.py prompted --data SHARED --models DIR --out OUT
    python benchmarks/llm_teacher.py tuned --data SHARED --models DIR --out OUT

`prompted`: the model labels texts with zero and a few examples in its prompt. Students learn from its answers alone
(`distil.alpha: 0`) over the number of texts asked, from labels by people alone, and from both. `tuned`: with a head and
adapters it teaches a student, against an encoder whose weights are all tuned. Every size is an option. All answers and
runs are kept below --out, and the same command goes on where it stopped. The rows that score chose nothing but the
prompt's temperature.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from harness import command_line, markdown, tell_machine

from kdlora import AskSettings, ask, build_config, compare, run_experiment
from kdlora.evidence.records import Asked, ExperimentLayout
from kdlora.system.storage import write_json_atomic

SERVER = Path(__file__).with_name("llm_server.py")


class DataSet(NamedTuple):
    """Where a set lies below --data, its columns, names for its labels, and how many examples a prompt shows."""

    train: str
    scored: str
    text: str
    label: str
    names: dict[str, str]
    shots: int


SETS = {
    "sst2": DataSet(
        *("glue/SST-2/train.tsv", "glue/SST-2/dev.tsv", "sentence", "label"),
        names={"0": "negative", "1": "positive"},
        shots=8,
    ),
    "banking77": DataSet(
        *("intents/banking77/train.csv", "intents/banking77/test.csv", "text", "category"), names={}, shots=77
    ),
}


def read_set(data: Path, name: str, part: str) -> pd.DataFrame:
    """Read a file as rows of id, text and label, each text once."""
    own = SETS[name]
    file = data / getattr(own, part)
    dialect = {"sep": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
    rows = pd.read_csv(file, dtype=str, keep_default_na=False, **dialect)
    labels = rows[own.label].map(lambda label: own.names.get(label, label.replace("_", " ")))
    found = pd.DataFrame({"text": rows[own.text].str.strip(), "label": labels}).drop_duplicates("text")
    found.insert(0, "id", [f"{part}-{row}" for row in found.index])
    return found[found["text"] != ""]


def write_rows(options: argparse.Namespace, name: str, folder: Path) -> list[str]:
    """Draw the labelled rows, label by label in turn, the texts and the scored rows; give the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_set(options.data, name, "train").sample(frac=1, random_state=0)
    order = np.argsort(rows.groupby("label").cumcount().to_numpy(), kind="stable")
    labelled = rows.iloc[order[: max(options.human)]]
    for count in options.human:
        labelled.head(count).to_csv(folder / f"people-{count}.csv", index=False)
    rest = rows.drop(labelled.index).drop(columns="label")
    rest.head(max(options.texts)).to_csv(folder / "texts.csv", index=False)
    scored = read_set(options.data, name, "scored").sample(frac=1, random_state=0)
    scored[~scored["text"].isin(rows["text"])].head(options.scored).to_csv(folder / "scored.csv", index=False)
    return sorted(rows["label"].unique())


@contextlib.contextmanager
def served(options: argparse.Namespace) -> Iterator[str]:
    """Give the address of the language model."""
    if options.url is not None:
        yield options.url
        return
    command = [sys.executable, str(SERVER), str(options.models / options.model)]
    command += ["--threads", str(options.threads), "--dtype", options.dtype]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        try:
            yield service.stdout.readline().strip()  # type: ignore[union-attr]
        finally:
            service.kill()


def ask_about(options: argparse.Namespace, folder: Path, shots: int, labels: Sequence[str]) -> Path:
    """Have all texts labelled, the labelled rows and the scored ones too; what was answered is not asked again."""
    to = folder / f"asked-{options.codes}-{shots}"
    if not (to / "probabilities.parquet").exists():
        with served(options) as url:
            settings = AskSettings(
                options.model.removesuffix("/hf"),
                base_url=url,
                labels=dict.fromkeys(labels, ""),
                shots=shots,
                codes=options.codes,
                audit=str(folder / "scored.csv"),
                unlabelled=str(folder / "texts.csv"),
                concurrency=2,  # it answers one after another
                timeout=600,
            )
            start = time.perf_counter()

            def tell(done: int, total: int) -> None:
                if done % 100 == 0:
                    seconds = time.perf_counter() - start
                    print(f"{folder.name}, {shots} examples: {done:,} of {total:,} asked, {seconds:,.0f} s", flush=True)

            ask(str(folder / f"people-{max(options.human)}.csv"), to, settings, progress=tell)
    return to


def write_answered(folder: Path, asked: Path, options: argparse.Namespace, count: int) -> Path:
    """Write those of the rows that people labelled about which the model answered; every label keeps one."""
    answered = pd.read_parquet(asked / "probabilities.parquet", columns=["id"])["id"]
    known = pd.read_csv(folder / f"people-{max(options.human)}.csv", dtype=str, keep_default_na=False)
    known = known[known["id"].isin(answered)]
    chosen = pd.read_csv(folder / f"people-{count}.csv", dtype=str, keep_default_na=False)["id"]
    rows = known[known["id"].isin(chosen)]
    more = known[~known["label"].isin(rows["label"])].drop_duplicates("label")
    file = folder / f"{asked.name}-{count}.csv"
    pd.concat([rows, more]).to_csv(file, index=False)
    return file


def experiment(options: argparse.Namespace, place: Path, train: Path, names: Sequence[str], **more: Any) -> Path:
    """Run an experiment, or what is left of it; sections of the config are laid over those that all have."""
    values: dict[str, Any] = {
        "name": place.name,
        "task": {"text": "text", "label": "label", "kind": "single-label", "label_names": list(names)}
        | {"metric": "accuracy"},
        "data": {"train": str(train), "validation": str(train.with_name("scored.csv")), "augment": 0},
        "student": {"model": str(options.models / options.student), "train": {"epochs": options.epochs}},
        "run": {"seeds": options.seeds, "threads": options.threads},
        "export": {"formats": [], "benchmark": False},
    }
    for section, content in more.items():
        values[section] = values.get(section, {}) | content
    labelling: list[tuple[float, int]] = []

    def hear(stage: Any, event: Any) -> None:
        if stage.name == "label":
            labelling.append((time.perf_counter(), event[0] if isinstance(event, tuple) else 0))

    print(f"{place}: {', '.join(values['run']['arms'])}", flush=True)
    result = run_experiment(build_config(values), place, listen=hear)
    for record in result.failed:
        print(f"{place}: {record.arm} failed: {record.error}", flush=True)
    if len(labelling) > 1:
        (start, first), (end, last) = labelling[0], labelling[-1]
        write_json_atomic(place.with_suffix(".labelling.json"), {"rows": last - first, "seconds": end - start})
    return place


def epochs(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """Give the epochs of about --steps steps, so that more texts do not mean more steps."""
    return {
        "model": str(options.models / options.student),
        "train": {"epochs": max(1, round(32 * options.steps / rows))},
    }


def run_prompted(options: argparse.Namespace, name: str) -> None:
    """Ask, train, and print the comparison of all students and the model itself."""
    folder = options.out / "prompted" / name
    names = write_rows(options, name, folder)
    few, most = min(options.human), max(options.texts)
    people = [
        experiment(
            options, folder / "runs" / f"people-{n}", folder / f"people-{n}.csv", names, run=arms("student-lora")
        )
        for n in sorted(options.human, reverse=True)
    ]
    lines = []
    for shots in (0, SETS[name].shots) if options.shots is None else options.shots:
        asked = ask_about(options, folder, shots, names)
        audit, paid = json.loads((asked / "audit.json").read_text()), Asked.read(asked)
        own = audit["prompts"][audit["chosen"]]
        calibration = f"{audit['ece_before']:.3f} to {audit['ece_after']:.3f}"
        after = f"{audit['accuracy_after']:.1f}"
        interval = f"{own['accuracy']:.1f} ({own['low']:.1f} to {own['high']:.1f})"
        rate = "–" if paid is None or paid.per_second is None else f"{paid.per_second:.2f}"
        lines.append((name, shots, interval, after, own["unanswered"], calibration, rate))
        places = list(people)
        asking = f"{options.codes}-{shots}"
        jobs = [(f"alone-{asking}-{texts}", few, texts, 0.0) for texts in sorted(options.texts)]
        jobs += [(f"both-{asking}-{labels}", labels, most, 0.5) for labels in options.human]
        for job, labels, texts, alpha in jobs:
            given = {
                "data": {"unlabelled": str(asked / "unlabelled.parquet"), "max_unlabelled_examples": texts},
                "teacher": {"probabilities": str(asked / "probabilities.parquet")},
                "student": epochs(options, labels + texts),
                "distil": {"alpha": alpha},
                "run": arms(*(("fft",) if alpha == 0 and texts == most else ()), "kd-lora"),
            }
            train = write_answered(folder, asked, options, labels)
            places.append(experiment(options, folder / "runs" / job, train, names, **given))
        print(compare(places, out=folder / f"compared-{asking}").markdown)
    header = (
        "set",
        "examples shown",
        "accuracy of the reported half",
        "with temperature and bias",
        "unanswered",
        "calibration error by them",
    )
    print(markdown((*header, "texts/s"), lines))


def arms(*names: str) -> dict[str, Any]:
    """Name the arms of an experiment, in the section that has them."""
    return {"arms": list(names)}


def run_tuned(options: argparse.Namespace, name: str) -> None:
    """Train both teachers and their students, and print the comparison and the time of labelling."""
    folder = options.out / "tuned" / name
    options.human, options.texts = [options.rows], [1]
    names = write_rows(options, name, folder)
    train = folder / f"people-{options.rows}.csv"
    settings = {"train": {"epochs": options.teacher_epochs}}
    teachers = {
        "encoder": ({"model": str(options.models / options.encoder)}, ("fft", "kd-lora", "student-lora")),
        "decoder": ({"model": str(options.models / options.model), "tuning": "lora"}, ("lora", "kd-lora")),
    }
    places, lines = [], []
    for kind, (teacher, own) in teachers.items():
        place = folder / "runs" / kind
        given = {"teacher": teacher | settings, "run": arms(*own)}
        places.append(experiment(options, place, train, names, **given))
        records = json.loads(ExperimentLayout(place).results.read_text())["runs"]
        first = next(record for record in records if record["arm"] in ("fft", "lora"))
        file = place.with_suffix(".labelling.json")
        timed = json.loads(file.read_text()) if file.exists() else {"rows": 0, "seconds": 0}
        rate = timed["rows"] / timed["seconds"] if timed["seconds"] else float("nan")
        model = Path(first["model"]).relative_to(options.models)
        lines.append((name, model, f"{first['train_seconds']:.0f}", f"{rate:.1f}", f"{options.rows / rate:.0f}"))
    print(compare(places, out=folder).markdown)
    print(markdown(("set", "teacher", "training, s", "labelled, texts/s", "seconds of all rows"), lines, 2))


def main() -> None:
    """Measure what the command line names."""
    parser = command_line(__doc__, "data", "models", "out")
    parser.add_argument("part", choices=("prompted", "tuned"))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--model", default="smollm2/hf", help="folder of the language model, below --models")
    parser.add_argument("--student", default="minilm-l6")
    parser.add_argument("--encoder", default="mpnet-base", help="the other teacher of `tuned`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32", help="of the served model, such as bfloat16")
    parser.add_argument("--url", help="ask this server, ending in /v1, in place of one that is started")
    parser.add_argument("--human", type=int, nargs="+", default=[100, 500, 2000], help="rows that people labelled")
    parser.add_argument("--texts", type=int, nargs="+", default=[500, 2000, 8000], help="texts asked about")
    parser.add_argument("--shots", type=int, nargs="+", help="examples in the prompt; default: 0, and 8 or 77")
    parser.add_argument("--codes", choices=("letters", "names"), default="letters", help="what the model answers with")
    parser.add_argument("--scored", type=int, default=1000, help="rows that score")
    parser.add_argument("--steps", type=int, default=1500, help="of a student that a prompted model teaches")
    parser.add_argument("--epochs", type=float, help="of the other students; default: kdlora's choice")
    parser.add_argument("--rows", type=int, default=8000, help="labelled rows of `tuned`")
    parser.add_argument("--teacher-epochs", type=float, default=3)
    options = parser.parse_args()
    for name in options.sets:
        (run_prompted if options.part == "prompted" else run_tuned)(options, name)
    tell_machine()


if __name__ == "__main__":
    main()
