"""The words of the pages: our own list must find what readers stumbled over."""

import importlib.util

import pytest
from pages import ROOT

pytest.importorskip("proselint")
_SPEC = importlib.util.spec_from_file_location("readability", ROOT / "docs" / "readability.py")
readability = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(readability)

RIDDLES = [
    "Back comes a merged student in plain transformers format.",
    "It is 5.4% of the size, and loses 0.2 points of accuracy on SST-2 to itself in fp32 (one training).",
    "A process that ends ends the run with an error within seconds.",
    "A control without a teacher learns its pairs by heart by their words.",
    "What is an option of PEFT has stayed one.",
    "`experiment/` is the only room that knows the whole way.",
    "It can be played by ear.\n\nAt the end of the day, it is very unique.",
    " ".join(["word"] * 41) + ".",
]


@pytest.mark.parametrize("text", RIDDLES)
def test_a_riddle_is_found(text):
    """A list whose pattern matches nothing passes every page."""
    assert list(readability.find_faults(f"# Title\n\n{text}\n"))


@pytest.mark.parametrize("page", readability.read_pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_riddle(page):
    """Dense sentences come back one at a time, and nobody reads the whole site for them."""
    assert list(readability.find_faults(page.read_text(encoding="utf-8"))) == []


def test_lines_are_those_of_the_page():
    """A fault that is reported in another line than it stands in."""
    text = "# Title\n\n```bash\nfor room in house\n```\n\nSee [this\nroom](rooms.md) and `room`.\n"
    assert [number for number, _ in readability.find_faults(text)] == [8]
