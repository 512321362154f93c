"""A corpus of bad input through the command line: exit 2, place and remedy, no traceback, nothing changed on disk."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from corpus_configs import FIELDS, FILES, OVERRIDES
from corpus_data import CASES, DataCase
from corpus_models import COMMANDS, MODELS, NAMES, TABLES

from experiments import Workshop, edit_json, read_rows, snapshot, write_lines
from tiny import save_classifier


@pytest.fixture(scope="module")
def student(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as an experiment ships it."""
    return save_classifier(workshop.student, tmp_path_factory.mktemp("shipped"))


@pytest.fixture
def refused(cli: Callable[..., Any], workshop: Workshop, tmp_path: Path) -> Callable[..., None]:
    """`refused(expected, arguments...)`, or `refused(expected, changes={...})` for a config file."""

    def check(expected: tuple[str, ...], *arguments: object, changes: dict[str, Any] | None = None) -> None:
        out = tmp_path / "out"
        if changes is not None:
            config = tmp_path / "config.yaml"
            config.write_text(yaml.safe_dump(workshop.values(changes)), encoding="utf-8")
            arguments = ("run", config, "--out", out)
        before = snapshot(tmp_path)
        shown = cli(*arguments, code=2)
        assert shown.err.startswith("kdlora: "), shown.err
        assert shown.out == ""
        for part in expected:
            assert part in shown.err, (part, shown.err[:2000])
        assert len(shown.err) < 20_000  # a message, and not the whole input
        assert snapshot(tmp_path) == before
        assert not out.exists()

    return check


@pytest.mark.parametrize(("changes", "expected"), FIELDS, ids=[f"{case[0]}"[:70] for case in FIELDS])
def test_config_values(refused, changes, expected):
    """A value out of range that is taken all the same wastes the night, or makes nonsense that looks like a result."""
    refused(expected, changes=changes)


@pytest.mark.parametrize(("content", "expected"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_config_files(refused, tmp_path, content, expected):
    """What is no config must not be half of one; what is hostile must not run, nor fill the memory."""
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    refused((*expected, "config.yaml"), "run", path)


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[case[0][:30] for case in OVERRIDES])
def test_overrides(refused, workshop, tmp_path, override, expected):
    """An override that is silently dropped gives the figures of another experiment."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(workshop.values()))
    refused(expected, "run", path, "--set", override, "--out", tmp_path / "out")


@pytest.mark.parametrize("case", CASES, ids=[": ".join((case.name, *case.expected[-1:])) for case in CASES])
def test_data_files(refused, tmp_path, case: DataCase):
    """Rows that are read otherwise than they were meant train a model that nobody asked for."""
    path = tmp_path / case.name
    if case.content is not None:
        path.write_bytes(case.content)
    data = {"train": str(path), "validation": None, **case.changes.get("data", {})}
    refused(case.expected, changes={**case.changes, "data": data})


@pytest.mark.parametrize(("damage", "expected"), MODELS, ids=[case[1][-1] for case in MODELS])
def test_model_folders(refused, workshop, tmp_path, damage, expected):
    """Random weights train too, pickled ones run code, and both leave a score."""
    folder = Path(shutil.copytree(workshop.student, tmp_path / "model"))
    damage(folder)
    refused((str(folder), *expected), changes={"student": {"model": str(folder)}})
    assert not (folder / "owned").exists()


@pytest.mark.parametrize(("name", "expected"), NAMES, ids=[case[0][:30] for case in NAMES])
def test_model_names(refused, name, expected):
    """A misspelt path must not be asked for on the Hub."""
    refused(expected, changes={"student": {"model": name}})


@pytest.mark.parametrize(("change", "expected"), TABLES, ids=[case[1][-1] for case in TABLES])
def test_tables_of_a_teacher(refused, workshop, tmp_path, change, expected):
    """A table that does not fit teaches the wrong row, or the wrong label."""
    good = [{"id": row["id"], "negative": 0.25, "positive": 0.75} for row in read_rows(workshop.train)]
    rows, path = change(good), tmp_path / "table.jsonl"
    path.write_text(rows) if isinstance(rows, str) else write_lines(path, rows)
    named = [part.replace("FIRST", repr(good[0]["id"])) for part in expected]
    refused((path.name, *named), changes=distilled(logits=str(path)))


def distilled(**teacher: Any) -> dict[str, Any]:
    """Give the changes that make an experiment one of a teacher that is there already."""
    return {"teacher": {"model": None, **teacher}, "run": {"arms": ["kd-lora"]}}


def test_teachers_that_cannot_teach(refused, student, workshop, tmp_path):
    """A fresh head teaches at random, and labels matched by position teach spam for praise."""
    refused((str(workshop.teacher), "fine-tuned", "teacher.model"), changes=distilled(fine_tuned=str(workshop.teacher)))
    folder = Path(shutil.copytree(student, tmp_path / "given"))
    for names, expected in (
        (("ham", "spam"), (str(folder), "ham, spam", "negative", "teacher.label_names")),
        (("LABEL_0", "LABEL_1"), ("Set teacher.label_names",)),
    ):
        places = {name: place for place, name in enumerate(names)}
        edit_json(folder / "config.json", id2label=dict(enumerate(names)), label2id=places)
        refused(expected, changes=distilled(fine_tuned=str(folder)))


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS, ids=[" ".join(c[0])[:40] for c in COMMANDS])
def test_command_lines(refused, student, workshop, tmp_path, monkeypatch, arguments, expected):
    """A mistyped command must not begin anything."""
    monkeypatch.chdir(tmp_path)
    places = {"{student}": str(student), "{train}": str(workshop.train)}
    refused(expected, *(places.get(argument, argument) for argument in arguments))


def test_the_page_has_the_size_of_the_corpus():
    """A figure that was true once."""
    size = sum(len(part) for part in (FIELDS, FILES, OVERRIDES, CASES, MODELS, NAMES, TABLES, COMMANDS))
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert f"| bad inputs | {size} |" in page
