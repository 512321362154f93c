"""The examples in the docstrings of the public names, in the order of the reference page, in one session."""

import re
import sys
from pathlib import Path

import pytest
from pages import ROOT, follow, read_blocks

import kdlora
import tiny
from deploy_folders import build_classifier
from experiments import write_lines

PAGE = ROOT / "docs" / "api.md"
RUN = """
import doctest, sys
import kdlora
from kdlora import *
session = {"rows": None}
exec(sys.argv[1], session)
runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
for name in sys.argv[2:]:
    text = getattr(kdlora, name).__doc__
    if name == "DistillationTrainer":
        tokens = session["encoder"].tokenizer
        session["rows"] = session["taught"].train.map(lambda row: tokens(row["text"], truncation=True, max_length=64))
    test = doctest.DocTestParser().get_doctest(text, session, name, kdlora._HOMES[name], 0)
    if test.examples:
        runner.run(test, clear_globs=False)
    session.update(test.globs)
print(runner.summarize())
sys.exit(runner.failures > 0)
"""
SUITE = """
name: tiny
tasks: [sst2]
families: {small: {teacher: {model: bert-base-uncased}, student: {model: distilbert-base-uncased}}}
arms: [student-lora]
seeds: [0]
config: {recipe: paper, data: {path: nyu-mll/glue}, student: {train: {epochs: 1}}, run: {precision: fp32}}
"""
SEARCH = """
recipe: paper
family: bert
task: {text: review, label: sentiment}
data: {train: reviews.csv}
student: {train: {epochs: 1}}
search: {space: {student.train.learning_rate: {low: 1.0e-4, high: 1.0e-2, log: true}}}
"""


def names_in_order() -> list[str]:
    """List the public names as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^::: kdlora\.\S+\.(\w+)$", text, re.MULTILINE)
    return [*found, *re.findall(r"\w+Error", re.search(r"\bmembers: \[(.*)\]", text)[1])]


def furnish(folder: Path) -> None:
    """Write the files that the examples name."""
    (folder / "configs").symlink_to(ROOT / "configs")
    rows = [{"review": row["text"], "sentiment": row["label"]} for row in tiny.sentiment_rows(120)]
    tiny.write_csv(folder / "reviews.csv", rows)
    write_lines(folder / "answers.jsonl", [{"id": str(n), "negative": 0.3, "positive": 0.7} for n in range(120)])
    build_classifier("bert", folder / "runs" / "names" / "student", names=("O", "B-PER", "I-PER"), kind="tokens")
    (folder / "suite.yaml").write_text(SUITE)
    (folder / "search.yaml").write_text(SEARCH)


def test_every_public_name_has_an_example():
    """A function whose call each reader has to work out from its parameters."""
    shown = {name for name in names_in_order() if ">>>" in (getattr(kdlora, name).__doc__ or "")}
    code = "\n".join(block.code for block in read_blocks(PAGE) if block.is_run)
    code += "\n".join(getattr(kdlora, name).__doc__ for name in shown)
    shown |= {getattr(kdlora, name).__annotations__.get("return") for name in shown}  # results, by what gives them
    assert [name for name in kdlora.__all__ if name not in shown and not re.search(rf"\b{name}\(", code)] == []


@pytest.mark.docs
@pytest.mark.timeout(900)
def test_the_examples_run(reader, tmp_path):
    """An example that no longer runs is worse than none."""
    furnish(tmp_path)
    begin = next(block.code for block in read_blocks(PAGE) if block.is_run)
    own = {"OPENAI_BASE_URL": f"{reader['LLM_URL']}/v1", "OPENAI_API_KEY": "none"}
    follow([sys.executable, "-c", RUN, begin, *names_in_order()], tmp_path, reader | own)
