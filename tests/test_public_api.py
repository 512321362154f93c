"""The names that users import."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kdlora
from fabricate import make_experiment
from kdlora.extras import EXTRAS

ROOT = Path(__file__).parents[1]


def test_every_public_name_can_be_imported_and_is_on_the_page():
    """A name whose home moved; one that only its source describes, or that an editor promises and Python refuses."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in kdlora.__all__:
        assert getattr(kdlora, name) is not None
        assert name in dir(kdlora)
        assert re.search(rf"\b{name}\b", page), name
    assert set(re.findall(r"^::: kdlora\.\S+\.(\w+)$", page, re.MULTILINE)) <= set(kdlora.__all__)
    with pytest.raises(AttributeError, match="no attribute 'run_experimentt'"):
        _ = kdlora.run_experimentt
    tree = ast.parse(Path(kdlora.__file__).read_text(encoding="utf-8"))
    typed = next(part for part in tree.body if isinstance(part, ast.If)).body
    assert {one.asname: part.module for part in typed for one in part.names} == kdlora._HOMES


def test_what_is_light_loads_nothing_heavy(tmp_path):
    """Completion, `--help`, the report and every script that only wants `Config` would wait for torch."""
    make_experiment(tmp_path / "e", seeds=(0,))
    code = "import kdlora, kdlora.data.tasks; kdlora.Config; kdlora.KdLoraError; kdlora.load_config; kdlora.Task; "
    code += "from kdlora.report.report import make_report; make_report('e', draws=100); "
    code += "import sys; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_each_extra_names_its_packages():
    """A package that moves into an extra would be missed with a traceback in place of the sentence."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {"scikit_learn": "sklearn", "protobuf": "sentencepiece"}
    for extra, needs in project["optional-dependencies"].items():
        names = {re.split(r"[\[>]", need)[0].replace("-", "_") for need in needs} - {"kdlora"}
        if extra not in ("dev", "docs"):
            assert {modules.get(name, name) for name in names} <= set(EXTRAS[extra]), extra


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("torch", ["run", "--train", "a.csv", "--text", "b", "--label", "c", "--family", "bert"]),
        ("datasets", ["defer", "a"]),
        ("pyarrow", ["report", "a"]),
    ],
)
def test_a_verb_names_the_extra_that_it_lacks(tmp_path, module, arguments):
    """A traceback about a package that nobody was told of."""
    (tmp_path / "a.csv").write_text("b,c\none,1\ntwo,0\n")
    code = f"import sys; sys.modules[{module!r}] = None; from kdlora.cli import main; main()"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    sentence = rf"kdlora: .* needs {module}, not installed here: pip install 'kdlora\[train\]'\n"
    assert re.fullmatch(sentence, done.stderr)


def test_a_name_names_the_extra_that_it_lacks(monkeypatch):
    """The same from Python, where an import has to stay an ImportError."""
    monkeypatch.delitem(sys.modules, "kdlora.distil.losses", raising=False)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch", None)
        with pytest.raises(ImportError, match=r"kdlora.distillation_loss needs torch, .* 'kdlora\[train\]'"):
            _ = kdlora.distillation_loss
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(kdlora.MissingExtraError, match="a search needs optuna"):
        kdlora.run_search(None, None)
