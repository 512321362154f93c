"""Settings and fixtures of every test: no network, no user's caches, tiny real models."""

import gc
import importlib.util
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from filelock import FileLock

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
_spec = importlib.util.spec_from_file_location("network_guard", _GUARD / "sitecustomize.py")
assert _spec is not None
assert _spec.loader is not None
sys.modules["network_guard"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["network_guard"])

hypothesis.settings.register_profile("tests", deadline=None, max_examples=40)
hypothesis.settings.load_profile("tests")
pytest_plugins = ["experiment_fixtures"]
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

    benchmark._LEAST_SECONDS = 0.02
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
    """`tiny_model_folder(family, layers=2, hidden=32, seed=0)` gives a saved checkpoint without a head; read only."""
    import tiny

    root = tmp_path_factory.mktemp("tiny-models")
    built: dict[tuple[object, ...], Path] = {}

    def folder(family: str, *, layers: int = 2, hidden: int = 32, seed: int = 0) -> Path:
        key = (family, layers, hidden, seed)
        if key not in built:
            path = root / "-".join(str(part) for part in key)
            built[key] = tiny.build_model_folder(family, path, layers=layers, hidden=hidden, seed=seed)
        return built[key]

    return folder


@pytest.fixture(scope="session")
def glue_folder() -> Path:
    """The GLUE folder in the benchmark's own layout, beside the repository; skips where there is none."""
    if not (GLUE / "MRPC" / "train.tsv").is_file():
        pytest.skip(f"no GLUE data at {GLUE}")
    return GLUE
