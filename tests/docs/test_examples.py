"""The scripts and notebooks of examples/, run from top to bottom with tiny models under the real names."""

import re
import shutil
import sys

import pytest
from pages import ROOT, follow

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.docs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_the_script_runs(script, reader, tmp_path):
    """An example that no longer runs is worse than none."""
    printed = follow([sys.executable, str(script)], tmp_path, reader)
    assert printed.strip()
    assert re.search(r"(?<!0 )failed", printed) is None


@pytest.mark.docs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_notebook_runs(notebook, reader, tmp_path):
    """Bars that flood a notebook, or a table that shows as a wall of text."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    pytest.importorskip("nbclient")
    shutil.copy(notebook, tmp_path)
    code = "import sys, nbformat, nbclient; n = nbformat.read(sys.argv[1], 4); nbclient.NotebookClient(n, timeout=800)"
    code += ".execute(); nbformat.write(n, 'done.ipynb')"
    follow([sys.executable, "-c", code, notebook.name], tmp_path, reader)
    cells = [cell for cell in nbformat.read(tmp_path / "done.ipynb", 4).cells if cell.cell_type == "code"]
    shown = [output for cell in cells for output in cell.outputs]
    html = [output["data"]["text/html"] for output in shown if "text/html" in output.get("data", {})]
    assert any("<progress" in page for page in html), "bars below the cell"
    assert any("<caption>" in page and "kd-lora" in page for page in html), "the table of the arms"
    assert not [output for output in shown if output.output_type == "stream" and "Error" in output.text]


def test_there_are_four_scripts_and_two_notebooks_without_output():
    """Committed outputs carry somebody's machine, and go stale."""
    assert len(EXAMPLES) >= 4
    assert len(NOTEBOOKS) >= 2
    for notebook in NOTEBOOKS:
        assert '"outputs": []' in notebook.read_text(encoding="utf-8")
        assert '"output_type"' not in notebook.read_text(encoding="utf-8")
