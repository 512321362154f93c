"""Run the tests with the lowest or the newest allowed version of every package that kdlora names.

    python tests/versions.py {lowest,newest} FOLDER [PYTEST ARGUMENTS]
    python tests/versions.py bounds

Builds an environment in FOLDER (kept, so that a second call is quick) with uv, which alone can choose the lowest
versions, and runs a part of the suite there (SMOKE). `bounds` prints the lowest allowed version of all that kdlora
needs, for an audit. Standard library only.
"""

import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("train", "ask", "ray", "search", "serve")
RESOLUTION = {"lowest": "lowest-direct", "newest": "highest"}
TOOLS = ("hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "sqlalchemy")
SMOKE = (
    *("test_config.py", "test_cli.py", "test_public_api.py", "test_python_users.py", "data", "models/test_adapters.py"),
    *("distil/test_losses.py", "distil/test_resume.py", "deploy/test_classifier.py", "deploy/test_export.py"),
    *("deploy/test_predict_file.py", "experiment/test_kinds.py", "report/test_report.py", "suites/test_search.py"),
    *("ask/test_ask.py", "deploy/test_serving.py"),
)


def bounds() -> list[str]:
    """Give `==` the lower bound of every dependency, those of the extras that users install among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    names = (*EXTRAS, "trackers", "openvino", "openvino-export")
    wanted = [*project["dependencies"], *(one for name in names for one in extras[name])]
    wanted = [text for text in wanted if not text.startswith("kdlora")]
    return [re.sub(r"\[.*?\]", "", re.sub(r">=([0-9.]+).*", r"==\1", text)) for text in wanted]


def main() -> None:
    """Build the environment and run the tests in it."""
    if sys.argv[1:] == ["bounds"]:
        print("\n".join(bounds()))
        return
    which, folder, arguments = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    if which not in RESOLUTION:
        raise SystemExit(f"{which!r}: expected lowest or newest")
    python, uv = str(folder / "bin" / "python"), shutil.which("uv") or str(folder / "bin" / "uv")
    if not Path(python).exists():
        venv.create(folder, with_pip=not shutil.which("uv"))
    if not Path(uv).exists():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python]
    # Not `-e .[...]`: of an editable project uv gives some packages their newest versions.
    wanted = ["-r", str(ROOT / "pyproject.toml"), *(f"--extra={extra}" for extra in EXTRAS)]
    subprocess.run([*install, "--upgrade", "--resolution", RESOLUTION[which], *wanted], check=True)
    subprocess.run([*install, "--no-deps", "-e", str(ROOT)], check=True)
    subprocess.run([*install, *TOOLS], check=True)
    subprocess.run([uv, "pip", "list", "--python", python], check=True)
    smoke = [str(ROOT / "tests" / name) for name in SMOKE]
    # Old versions of some packages call what new versions of others have deprecated.
    warnings = ["-W", "ignore::DeprecationWarning"] if which == "lowest" else []
    command = [python, "-m", "pytest", "-n", "auto", "--dist", "loadfile", *warnings, *(arguments or smoke)]
    raise SystemExit(subprocess.run(command, cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
