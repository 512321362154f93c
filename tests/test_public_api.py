"""The names that users import."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kdlora
from fabricate import make_experiment


@pytest.mark.parametrize("name", kdlora.__all__)
def test_every_public_name_can_be_imported(name):
    """A name whose home moved fails at the user's first import, and nowhere before."""
    assert getattr(kdlora, name) is not None
    assert name in dir(kdlora)


def test_the_page_of_the_reference_has_the_public_names_and_no_others():
    """A public function that only its source describes; an import that the page promises and Python refuses."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert [name for name in kdlora.__all__ if not re.search(rf"\b{name}\b", page)] == []
    addressed = re.findall(r"^::: kdlora\.\S+\.(\w+)$", page, re.MULTILINE)
    assert [name for name in addressed if name not in kdlora.__all__] == []


def test_an_unknown_name_says_so():
    """A lazy module that answers anything with None hides every misspelling."""
    with pytest.raises(AttributeError, match="no attribute 'run_experimentt'"):
        _ = kdlora.run_experimentt


@pytest.mark.parametrize(
    "code",
    [
        "import kdlora; kdlora.Config; kdlora.KdLoraError; kdlora.load_config; kdlora.Task",
        "import kdlora.data.tasks",
        "from kdlora.report.report import make_report; make_report(['e'], draws=100)",
    ],
    ids=["names", "tasks", "report"],
)
def test_what_is_light_loads_nothing_heavy(tmp_path, code):
    """Completion, `--help`, the report and every script that only wants `Config` would wait for torch."""
    make_experiment(tmp_path / "e", seeds=(0,))
    code += "; import sys; print({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
