"""Settings and fixtures of every test: no network, no user's caches, tiny real models."""

import gc
import os
import pickle
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from filelock import FileLock
from typer.main import get_command

gc.disable()  # until all test modules are imported: there is no garbage among them, and to look costs seconds
# Before any import of torch, transformers or datasets: they read these once.
_CACHES = Path(tempfile.mkdtemp(prefix="kdlora-tests-"))
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(_CACHES / "huggingface"),
        "HF_HUB_CACHE": str(_CACHES / "huggingface" / "hub"),
        "HF_DATASETS_CACHE": str(_CACHES / "huggingface" / "datasets"),
        "XDG_CACHE_HOME": str(_CACHES),
        "MPLCONFIGDIR": str(_CACHES / "matplotlib"),
        "MPLBACKEND": "Agg",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny, and two test processes share the cores

# No test may reach the network, nor a process that it starts: see tests/guard/sitecustomize.py.
_GUARD = Path(__file__).parent / "guard"
_NETWORK_LOG = Path(os.environ.setdefault("KDLORA_TESTS_NETWORK_LOG", str(_CACHES / "network.log")))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_GUARD), os.environ.get("PYTHONPATH"))))
runpy.run_path(str(_GUARD / "sitecustomize.py"))

hypothesis.settings.register_profile("tests", deadline=None, max_examples=40)
hypothesis.settings.load_profile("tests")
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
_build_verbs = cache(get_command)  # once, not for each call
GLUE = Path(__file__).parents[2] / "shared" / "glue"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with a slow test first: begun last, one would leave the other processes idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Keep what the test modules imported from the garbage collector: accelerate calls it in every training."""
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Save what is most of a test's time and not looked at: the marks in a report's figures, a benchmark's repetitions.

    A test that looks at figures is marked `drawn`.
    """
    from kdlora.deploy import benchmark
    from kdlora.report import deferred, outputs, plots

    benchmark._LEAST_SECONDS, benchmark._LATENCY_TEXTS = 0.02, 8
    drawing = vars(plots).setdefault("_drawing", plots.draw)
    for module in (plots, outputs, deferred):
        module.draw = drawing if item.get_closest_marker("drawn") else _outline


def _outline(paint: object, title: str, description: str, identity: str, *, caption: str = "", **_: object) -> object:
    """Stand for the report's `draw`: a figure with its words, and nothing drawn."""
    from kdlora.report import plots

    svg = plots._for_page('viewBox="0 0 1 1"></style></defs></svg>', title, description, identity)
    return plots.Figure(title, svg, description, caption)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Likewise what the tests of a module imported, torch's exporter for one."""
    if nextitem is None or nextitem.path != item.path:
        gc.freeze()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the session where the network was asked, though a handler may have swallowed the guard's error."""
    gc.unfreeze()  # hypothesis looks around when the session ends
    if _NETWORK_LOG.exists():
        print(f"\nthe network was asked:\n{_NETWORK_LOG.read_text(encoding='utf-8')}")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHES, ignore_errors=True)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], object]:
    """`made_once(name, make)` gives what `make(folder)` returned in the first test process that asked; read only."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def give(name: str, make: Callable[[Path], object]) -> object:
        folder, made = root / name, root / f"{name}.pickle"
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                made.write_bytes(pickle.dumps(make(folder)))
            return pickle.loads(made.read_bytes())  # noqa: S301 - our own

    return give


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A WordPiece tokenizer of a few hundred pieces; do not change it, it is shared."""
    import tiny

    return tiny.train_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_folder(family, layers=2)` gives a saved checkpoint without a head; read only."""
    import tiny

    root = tmp_path_factory.mktemp("tiny-models")
    build = cache(lambda family, n: tiny.build_model_folder(family, root / f"{family}-{n}", layers=n))
    return lambda family, *, layers=2: build(family, layers)


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """The GLUE folder in the benchmark's own layout, beside the repository; skips where there is none."""
    if not (GLUE / "MRPC" / "train.tsv").is_file():
        pytest.skip(f"no GLUE data at {GLUE}")
    return GLUE


@pytest.fixture(scope="session")
def workshop(made_once):
    """Models and data for small experiments."""
    return made_once("workshop", _furnish)


def _furnish(folder: Path) -> object:
    import tiny
    from experiments import Workshop

    return Workshop(
        teacher=tiny.build_model_folder("bert", folder / "bert"),
        student=tiny.build_model_folder("distilbert", folder / "distilbert", layers=1),
        train=tiny.write_csv(folder / "train.csv", tiny.sentiment_rows(64)),
        validation=tiny.write_csv(folder / "validation.csv", tiny.sentiment_rows(40, seed=1)),
    )


@pytest.fixture(scope="session")
def experiment(workshop, made_once):
    """The result of all six arms with two seeds; read only, see `copy_experiment`."""
    from experiments import ARMS
    from kdlora.experiment.run import run_experiment

    config = workshop.config({"run": {"arms": ARMS, "seeds": [0, 1]}})
    return made_once("all-arms", lambda folder: run_experiment(config, folder / "all-arms"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`cli("run", path, ..., code=0)` calls the command line in this process, and takes what it prints.

    It must end with that exit code, and without a traceback.
    """
    from kdlora.cli import main

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("typer.main.get_command", _build_verbs)

    def call(*arguments: object, code: int = 0) -> Any:
        monkeypatch.setattr(sys, "argv", ["kdlora", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in _SIGNALS}
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        printed = capsys.readouterr()
        assert (int(ended.value.code or 0), "Traceback" in printed.err) == (code, False), printed.err[-3000:]
        return printed

    return call
