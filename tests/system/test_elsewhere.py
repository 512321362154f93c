"""A run, predictions and labels in processes that lack what only Linux has; `guard/other_system.py` says what."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from kdlora.evidence.records import ExperimentLayout, read_record

GUARD = Path(__file__).parents[1] / "guard"


def kdlora(*arguments: object, elsewhere: bool = True, **options: object) -> subprocess.CompletedProcess[bytes]:
    """Call the command line in a process of another system, whose console has a few characters."""
    own = {"KDLORA_TESTS_SYSTEM": "another" if elsewhere else ""}
    own |= {"PYTHONIOENCODING": "cp1252"} if elsewhere else {}
    command = [sys.executable, "-m", "kdlora", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done


def test_the_mode_takes_away_what_it_says(tmp_path):
    """A mode that takes nothing away passes every test."""
    code = (
        "import os, socket, sys\nassert not hasattr(os, 'fork') and not hasattr(socket, 'send_fds')\n"
        "for call in (lambda: open('/proc/self/status'), lambda: os.open('.', os.O_RDONLY), lambda: os.kill(1, 0),\n"
        "             lambda: os.rename('a', 'b'), lambda: os.symlink('a', 'c'), lambda: open('a:b', 'w')):\n"
        "    with open('a', 'w') as file:\n"
        "        try:\n            call()\n        except (OSError, RuntimeError):\n            print('refused')\n"
    )
    own = {"KDLORA_TESTS_SYSTEM": "another", "PYTHONPATH": str(GUARD)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | own, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["refused"] * 6


@pytest.mark.elsewhere
@pytest.mark.timeout(600)
def test_a_run_predictions_and_labels(workshop, tmp_path):
    """What only Linux has creeps in unseen: on Windows or macOS the first run fails, or has other figures."""
    changes = {"run": {"arms": ["kd-lora"]}, "data": {"augment": 1}, "export": {"formats": ["onnx"]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(workshop.values(changes)))
    scores = []
    for name, elsewhere in (("elsewhere", True), ("linux", False)):
        kdlora("run", tmp_path / "config.yaml", "--out", tmp_path / name, elsewhere=elsewhere)
        record = read_record(ExperimentLayout(tmp_path / name).run("kd-lora", 0).record)
        assert (record.peak_memory_bytes is None) == elsewhere
        scores.append(record.metrics)
    assert scores[0] == scores[1]
    student = ExperimentLayout(tmp_path / "elsewhere").student
    for model in (student, ExperimentLayout(tmp_path / "elsewhere").onnx):
        told = kdlora("predict", model, "-", input="an ending that is wonderful → 日本\n".encode()).stdout
        assert json.loads(told)["label"] in ("negative", "positive")
    kdlora("label", student, workshop.train, "--to", tmp_path / "labelled")
    assert list((tmp_path / "labelled").glob("*.parquet"))
    assert not list(tmp_path.rglob("*.tmp-*"))
