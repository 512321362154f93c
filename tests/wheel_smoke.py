"""What the installed wheel must do, far from the repository: train in minutes, predict without what trains.

python wheel_smoke.py full FOLDER    in an environment that has the wheel with its extra `train`; writes an experiment
python wheel_smoke.py light FOLDER   in one that has the wheel alone; predicts with what the other wrote
"""

import importlib.util
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import kdlora
from kdlora.demo import demo_config
from kdlora.extras import EXTRAS

SCRIPT = Path(sys.executable).with_name("kdlora")
TEXT = "a film that stays with you for days"
MOST_BYTES = 200e6
"""Of all that the package index sends, unpacked; Python's own bytecode comes on top."""


def train(folder: Path) -> None:
    """Run the demo's experiment with one seed, one epoch and 300 rows, then predict with what it shipped."""
    config = demo_config()
    changes = {
        "data": config.data.model_copy(update={"max_train_examples": 300}),
        "run": config.run.model_copy(update={"seeds": (0,)}),
        "teacher": config.teacher.model_copy(update={"train": config.teacher.train.model_copy(update={"epochs": 1})}),
        "student": config.student.model_copy(update={"train": config.student.train.model_copy(update={"epochs": 1})}),
        "export": config.export.model_copy(update={"benchmark": False}),
    }
    result = kdlora.run_experiment(config.model_copy(update=changes), folder)
    assert not result.failed, result.failed
    assert result.layout.report_html.exists()
    print(f"{result!r}, {kdlora.Classifier.from_pretrained(result.layout.onnx).predict([TEXT])[0].label}")


def predict(folder: Path) -> None:
    """Predict with the export, be refused what trains, and measure the size."""
    present = [name for names in EXTRAS.values() for name in names if importlib.util.find_spec(name)]
    assert not present, f"the light installation has {present}"
    said = _call("predict", folder / "student-onnx", "-")
    assert said.returncode == 0, said.stderr
    for verb in (["predict", folder / "student", "-"], ["demo", "--out", folder / "never"], ["report", folder]):
        refused = _call(*verb)
        assert refused.returncode == 2, (verb, refused)
        assert refused.stderr.endswith("not installed here: pip install 'kdlora[train]'\n"), (verb, refused)
        assert "Traceback" not in refused.stderr, (verb, refused)
    packages = Path(kdlora.__file__).parents[1]
    tools = ("pip", "setuptools", "wheel", "_distutils_hack", "pkg_resources")
    kept = [entry for entry in packages.rglob("*") if not entry.relative_to(packages).parts[0].startswith(tools)]
    sizes = {entry: entry.stat().st_size for entry in kept if entry.is_file()}
    compiled = sum(size for entry, size in sizes.items() if entry.suffix == ".pyc")
    size = sum(sizes.values()) - compiled
    assert size < MOST_BYTES, f"the light installation takes {size / 1e6:.0f} MB"
    print(f"light: {size / 1e6:.0f} MB, and {compiled / 1e6:.0f} MB that Python compiled from it")


def _call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Call the command line with one text on standard input."""
    return subprocess.run([SCRIPT, *arguments], input=f"{TEXT}\n", capture_output=True, text=True, check=False)


def main() -> None:
    """Do what both installations must do, then what one of them must."""
    which, folder = sys.argv[1], Path(sys.argv[2]).absolute()
    assert "site-packages" in str(Path(kdlora.__file__)), f"this is not the wheel: {kdlora.__file__}"
    assert (Path(kdlora.__file__).parent / "py.typed").exists()
    {"full": train, "light": predict}[which](folder)
    subprocess.run([SCRIPT, "doctor"], check=True)
    subprocess.run([SCRIPT, "--help"], check=True, capture_output=True)
    print(f"kdlora {metadata.version('kdlora')}, {which} installation: as it must be")


if __name__ == "__main__":
    main()
