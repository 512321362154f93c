"""Every command that a page prints is typed, in the order of the page, in an empty folder."""

import re
import shutil
import sys
from pathlib import Path

import pytest
from pages import ROOT, follow, pages, read_blocks

import tiny
from experiments import write_lines

PAGES = [page for page in pages() if any(block.is_run for block in read_blocks(page))]
NEEDS = {
    "serve.md": ("node", "npm", "curl"),
    "tokens.md": ("node", "npm"),
    "browser.md": ("npm", "curl"),
    "tutorial.md": ("curl",),
}


@pytest.mark.docs
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_page_works_as_printed(page, reader, tmp_path):
    """Documentation rots in silence: an option is renamed, and only new users notice."""
    absent = [program for program in NEEDS.get(page.name, ()) if shutil.which(program) is None]
    if absent:
        pytest.skip(f"needs {', '.join(absent)}")
    for name in ("configs", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name)
    rows = tiny.sentiment_rows(120)  # of the files that the README supposes the reader to have
    tiny.write_csv(tmp_path / "reviews.csv", [{"review": row["text"], "sentiment": row["label"]} for row in rows])
    pairs = [
        {"question": row["text"], "answer": row["text"] if number % 2 else "no", "relevant": ["no", "yes"][number % 2]}
        for number, row in enumerate(rows)
    ]
    write_lines(tmp_path / "pairs.jsonl", pairs)
    follow([sys.executable, str(Path(__file__).with_name("pages.py")), str(page)], tmp_path, reader)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_a_block_that_is_not_run_says_why(page):
    """An excuse without a reason, or a language that the runner does not know and so leaves out."""
    for block in read_blocks(page):
        assert block.excuse is None or len(block.excuse) > 8, block
        assert block.language in ("", "bash", "python", "yaml", "js", "json", "console", "text"), block
        assert re.search(r"--8\s*<\s*--", block.code) is None, f"an include that is not put in: {block}"


def test_the_main_pages_are_found_and_have_commands_and_the_readme_is_short():
    """A pattern that matches nothing passes every test; and a stranger decides within five minutes."""
    names = {page.name for page in PAGES}
    assert {"README.md", "tutorial.md", "serve.md", "language-model.md", "hub.md"} <= names
    assert sum(block.is_run for page in PAGES for block in read_blocks(page)) > 30
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_no_printed_command_opens_a_port_to_the_network():
    """Docker and Python's own server listen at every address, unless they are told one, and ask nobody who they are."""
    files = [ROOT / "Dockerfile", *pages(), *(ROOT / "src").rglob("*.py")]
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    opening = [line for line in lines if re.search(r"docker run .*-p |-m http\.server", line)]
    assert len(opening) > 3
    assert [line for line in opening if "127.0.0.1" not in line] == []


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/api.md"])
def test_the_files_and_names_of_a_page_exist(page):
    """A map of rooms that were rebuilt since sends the newcomer astray."""
    source, text = ROOT / "src" / "kdlora", (ROOT / page).read_text(encoding="utf-8")
    files = [file.as_posix() for file in [*source.rglob("*.py"), *(ROOT / "tests").glob("*.py")]]
    named = re.findall(r"`((?:\w+/)*\w+\.py)`", text)
    assert [name for name in named if not any(file.endswith(f"/{name}") for file in files)] == []
    for address in re.findall(r"^::: kdlora\.(\S+)", text, re.MULTILINE):
        module, _, name = address.rpartition(".")
        file = source / f"{module.replace('.', '/')}.py"
        assert (source / f"{name}.py").exists() or re.search(rf"^(def|class) {name}\b", file.read_text(), re.MULTILINE)
