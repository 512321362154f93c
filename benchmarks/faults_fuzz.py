"""Fuzz the readers of configs and data; any exception but ours is a finding.

`fuzz` starts this file again for each reader, as `python faults_fuzz.py TARGET CORPUS FLAGS...`, for a bounded time.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEEDS = {
    "config": b"data: {train: a.csv}\nteacher: {model: t}\nstudent: {model: s, train: {epochs: 3}}\n",
    "override": b"lora.rank=4",
    "csv": b'id,text,label\n1,"a ""b"", c",a\n2,d,b\n3,e,a\n4,f,b\n',
    "tsv": b"id\ttext\tlabel\n1\tx y\ta\n2\tz\tb\n3\te\ta\n4\tf\tb\n",
    "jsonl": b'{"text": "x", "label": "a"}\n{"text": "y", "label": "b"}\n{"text": "z", "label": ["a"]}\n',
    "parquet": b"",
    "table": b'{"id": "1", "a": 0.5, "b": 1e3}\n{"id": 2, "logit:a": null, "b": 1}\n',
}


def fuzz(options: argparse.Namespace, log: Any, workshop: Any) -> None:
    """Fuzz every reader that has not had its minutes; the corpora stay, so that a later call goes on from them."""
    if importlib.util.find_spec("atheris") is None:
        raise SystemExit("the fuzzer needs atheris: pip install atheris (Linux or macOS, x86-64 or Arm)")
    for target in SEEDS:
        calls = [line["seconds"] for line in log.lines() if line["target"] == target]
        left = 60 * options.minutes - sum(calls)
        if left < 1 or time.monotonic() > options.until:
            continue
        corpus, findings = options.out / "corpus" / target, options.out / "findings" / target
        for folder in (corpus, findings):
            folder.mkdir(parents=True, exist_ok=True)
        flags = {"max_total_time": int(left), "seed": options.seed + 1 + len(calls), "rss_limit_mb": 4096}
        flags |= {"timeout": 30, "artifact_prefix": f"{findings}/", "max_len": 4096}
        command = [sys.executable, __file__, target, str(corpus), *(f"-{key}={value}" for key, value in flags.items())]
        begin, environment = time.monotonic(), os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        tries = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        found = sorted(path.name for path in findings.iterdir())
        line = {"target": target, "seconds": time.monotonic() - begin, "code": done.returncode, "findings": found}
        log.add(line | {"said": tries[-1] if tries else done.stderr[-3000:]})
        print(line, flush=True)


def reader_of(target: str, folder: Path) -> Callable[[bytes], None]:
    """Make the function that is fuzzed: it reads the bytes as a config, an override, a training file or a table."""
    from kdlora import read_teacher_table
    from kdlora.config import DataConfig, TaskConfig
    from kdlora.configfile import build_config, load_config, parse_mapping, save_config
    from kdlora.data.load import load_splits
    from kdlora.data.tasks import Task

    task = Task("single-label", ("text",), ("label",), ("a", "b"), ("accuracy",))
    path = folder / {"config": "config.yaml", "table": "table.jsonl"}.get(target, f"train.{target}")

    def read(data: bytes) -> None:
        path.write_bytes(data)
        if target == "config":
            config = load_config(path)
            if build_config(parse_mapping(save_config(config), "again")) != config:
                raise AssertionError("a config that does not survive being saved")
        elif target == "override":
            good = parse_mapping(SEEDS["config"].decode(), "seed")
            build_config(good, [data.decode("utf-8", errors="surrogateescape")])
        elif target == "table":
            read_teacher_table(path, task, values="logits", split="train")
        else:
            for row in load_splits(TaskConfig(), DataConfig(train=str(path))).train:
                if not row["text"].strip() or row["label"] is None:
                    raise AssertionError(f"a row without text or label was accepted: {row}")

    return read


def main(target: str, corpus: Path, flags: list[str]) -> None:
    """Fuzz one target in this process."""
    import atheris
    import pandas as pd

    with atheris.instrument_imports(include=["kdlora", "yaml"]):
        read = reader_of(target, Path(tempfile.mkdtemp(prefix="kdlora-fuzz-")))
        from kdlora.errors import KdLoraError
    seed = SEEDS[target]
    if target == "parquet":
        buffer = io.BytesIO()
        pd.DataFrame({"text": ["x", "y", "z"], "label": ["a", "b", "a"]}).to_parquet(buffer)
        seed = buffer.getvalue()
    (corpus / "seed").write_bytes(seed)

    def one(data: bytes) -> None:
        try:
            read(data)
        except KdLoraError:
            return

    atheris.Setup([sys.argv[0], str(corpus), *flags], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
