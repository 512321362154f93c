"""One fuzz target; any exception but ours is a finding. Started by `faults_fuzz.py`."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kdlora", "yaml"]):
    from kdlora import config as _config  # noqa: F401 - instrumented
    from kdlora import configfile
    from kdlora.config import DataConfig, TaskConfig
    from kdlora.data.load import load_splits
    from kdlora.data.tasks import Task
    from kdlora.distil.tables import read_teacher_table
    from kdlora.errors import KdLoraError

FOLDER = Path(tempfile.mkdtemp(prefix="kdlora-fuzz-"))
TASK = Task("single-label", ("text",), ("label",), ("a", "b"), ("accuracy",))
SEEDS = {
    "config": [
        b"data: {train: a.csv}\nteacher: {model: t}\nstudent: {model: s, train: {epochs: 3}}\nrun: {seeds: [0]}\n"
    ],
    "override": [b"lora.rank=4", b"run.arms=[fft]"],
    "csv": [b'id,text,label\n1,"a ""b"", c",a\n2,d,b\n3,e,a\n4,f,b\n'],
    "tsv": [b"id\ttext\tlabel\n1\tx y\ta\n2\tz\tb\n3\te\ta\n4\tf\tb\n"],
    "jsonl": [b'{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n{"text": "z", "label": ["a"]}\n'],
    "parquet": [],
    "table": [b'{"id": "1", "a": 0.5, "b": 1e3}\n{"id": 2, "logit:a": null, "b": 1}\n'],
}


def read_config(data: bytes) -> None:
    """Read a config file, and write what it means."""
    path = FOLDER / "config.yaml"
    path.write_bytes(data)
    config = configfile.load_config(path)
    again = configfile.build_config(configfile.parse_mapping(configfile.save_config(config), "again"))
    if again != config:
        raise AssertionError("a config that does not survive being saved")


def read_override(data: bytes) -> None:
    """Apply an override to a good config."""
    values = configfile.parse_mapping(SEEDS["config"][0].decode(), "seed")
    configfile.build_config(values, [data.decode("utf-8", errors="surrogateescape")])


def read_data(name: str) -> Callable[[bytes], None]:
    """Make a reader of a training file; what it accepts must have a text and a label in every row."""

    def read(data: bytes) -> None:
        path = FOLDER / name
        path.write_bytes(data)
        splits = load_splits(TaskConfig(), DataConfig(train=str(path)))
        for row in splits.train:
            if not row["text"].strip() or row["label"] is None:
                raise AssertionError(f"a row without text or label was accepted: {row}")

    return read


def read_table(data: bytes) -> None:
    """Read a table of a teacher's outputs."""
    path = FOLDER / "table.jsonl"
    path.write_bytes(data)
    read_teacher_table(path, TASK, values="logits", split="train")


def main() -> None:
    """Fuzz the target that the first argument names; the rest is libFuzzer's."""
    target, corpus = sys.argv[1], Path(sys.argv[2])
    readers = {"config": read_config, "override": read_override, "table": read_table}
    read = readers.get(target) or read_data(f"train.{target}")
    seeds = SEEDS[target]
    if target == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["x", "y", "z"], "label": ["a", "b", "a"]}), FOLDER / "seed.parquet")
        seeds = [(FOLDER / "seed.parquet").read_bytes()]
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            read(data)
        except KdLoraError:
            return

    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
