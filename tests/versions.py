"""Run the tests with the lowest or the newest allowed versions of the libraries that change most.

    python tests/versions.py {lowest,newest} FOLDER [PYTEST ARGUMENTS]
    python tests/versions.py bounds

Builds an environment in FOLDER (kept, so that a second call is quick) and runs the suite there; `bounds` prints the
lowest allowed version of all that kdlora needs, for an audit. Standard library only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "peft", "datasets")


def pins(which: str) -> list[str]:
    """Give pip's requirements: `==` the lower bounds for "lowest", nothing but the allowed range for "newest"."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    found = {re.match(r"[\w-]+", text)[0]: text for text in declared}
    if which == "newest":
        return [found[name] for name in LIBRARIES]
    return [f"{name}=={re.search(r'>=([0-9.]+)', found[name])[1]}" for name in LIBRARIES]


def bounds() -> list[str]:
    """Give `==` the lower bound of every dependency, those of the extras that users install among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(one for name in ("onnx", "search", "ray", "trackers") for one in extras[name]),
    ]
    return [re.sub(r"\[.*?\]", "", re.sub(r">=([0-9.]+).*", r"==\1", text)) for text in wanted]


def main() -> None:
    """Build the environment and run the tests in it."""
    if sys.argv[1:] == ["bounds"]:
        print("\n".join(bounds()))
        return
    which, folder, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if which not in ("lowest", "newest"):
        raise SystemExit(f"{which!r}: expected lowest or newest")
    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    subprocess.run([*pip, "-e", f"{ROOT}[onnx,dev]", *pins(which)], check=True)
    shown = f"import importlib.metadata as m; print({{n: m.version(n) for n in {LIBRARIES!r}}})"
    subprocess.run([python, "-c", shown], check=True)
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *arguments]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
