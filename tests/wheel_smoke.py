"""What the installed wheel must do, far from the repository: the demo's Python form on few rows, in minutes.

python wheel_smoke.py          in an environment that has the wheel and nothing of the repository
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import kdlora
from kdlora.demo import demo_config


def main() -> None:
    """Run the demo's experiment with one seed, one epoch and 300 rows, then predict with what it shipped."""
    assert "site-packages" in str(Path(kdlora.__file__)), f"this is not the wheel: {kdlora.__file__}"
    assert (Path(kdlora.__file__).parent / "py.typed").exists()
    config = demo_config()
    changes = {
        "data": config.data.model_copy(update={"max_train_examples": 300}),
        "run": config.run.model_copy(update={"seeds": (0,)}),
        "teacher": config.teacher.model_copy(update={"train": config.teacher.train.model_copy(update={"epochs": 1})}),
        "student": config.student.model_copy(update={"train": config.student.train.model_copy(update={"epochs": 1})}),
        "export": config.export.model_copy(update={"benchmark": False}),
    }
    with tempfile.TemporaryDirectory() as folder:
        result = kdlora.run_experiment(config.model_copy(update=changes), folder)
        assert not result.failed, result.failed
        assert result.layout.report_html.exists()
        answer = kdlora.Classifier.load(result.layout.onnx).predict(["a film that stays with you for days"])[0]
        print(f"kdlora {metadata.version('kdlora')}: {result!r}, {answer.label}")
    script = Path(sys.executable).with_name("kdlora")
    subprocess.run([script, "doctor"], check=True)
    subprocess.run([script, "--help"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
