import errno
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import children
import psutil
import pytest

from kdlora.errors import DataError
from kdlora.system import children as processes
from kdlora.system.children import ChildDiedError, close_server, run_in_child
from kdlora.system.environment import read_memory
from kdlora.system.ownership import owned_name

WAYS = ["forked", "started"] if sys.platform == "linux" and hasattr(os, "fork") else ["started"]


@pytest.fixture(autouse=True, scope="module", params=WAYS)
def way(request):
    """The ways to have a child here, the second in a process that lacks what only Linux has.

    What these tests start is closed; the server of the experiments, which holds the libraries, is put aside.
    """
    others = processes._shared.servers[:]
    processes._shared.servers.clear()
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "started":
            patch.delattr(os, "fork", raising=False)
            if sys.platform == "linux":
                patch.setenv("KDLORA_TESTS_SYSTEM", "another")
        yield request.param
        close_server()
    processes._shared.servers.extend(others)


def test_a_run_has_a_process_of_its_own_in_the_callers_place(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Two runs in one process would inherit each other's memory; another folder would break relative paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDLORA_TEST", "seen")
    assert run_in_child(os.getenv, "PYTORCH_NVML_BASED_CUDA_CHECK") == "1", "an import that asks begins CUDA"
    first, second = run_in_child(children.where), run_in_child(children.where)
    assert len({os.getpid(), first[0], second[0]}) == 3
    assert first[1:] == (str(tmp_path), "seen")


def test_the_peak_is_the_childs_own_and_includes_what_was_freed(way):
    """A level read at the end misses the peak; a parent's memory would be counted in every arm."""
    if way == "started":
        pytest.skip("without /proc no memory is measured")
    level = read_memory()
    assert 20 * 2**20 < level.anonymous <= level.resident <= level.high_water < 2**40
    ballast = bytearray(300 * 2**20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    small, large = (run_in_child(children.peak_of_allocating, megabytes) for megabytes in (1, 120))
    assert small < 15 * 2**20
    assert 110 * 2**20 < large < 140 * 2**20
    assert run_in_child(children.peak_of_allocating, 120, True) < 40 * 2**20


def test_messages_arrive_in_order():
    """A progress bar that sees half the events would stand still."""
    heard = []
    done = run_in_child(children.count, 3, on_message=heard.append)
    assert heard == [(0, 3), (1, 3), (2, 3), "done"]
    assert done == "counted"


def test_a_fault_keeps_its_class_and_its_words():
    """The command exits 2 on a KdLoraError and 1 on anything else; an experiment stops on a full disk alone."""
    for function, arguments, kind, match in (
        (children.fail, (DataError("train.csv, row 3: no label"),), DataError, r"train\.csv, row 3: no label"),
        (children.fail, (OSError(errno.ENOSPC, "No space left on device"),), OSError, "No space"),
        (children.raise_oddly, (), RuntimeError, "TwoArgumentsError: not rebuilt"),  # cannot travel, but as text
        (sys.exit, (3,), RuntimeError, "SystemExit: 3"),
        (threading.Lock, (), Exception, "pickle"),
        (signal.raise_signal, (signal.SIGKILL,), ChildDiedError, r"killed by SIGKILL.*out of memory"),
        (os._exit, (7,), ChildDiedError, "exit status 7"),
        (os._exit, (255,), ChildDiedError, "exit status 255"),
    ):
        with pytest.raises(kind, match=match) as caught:
            run_in_child(function, *arguments)
        assert kind is not DataError or "in fail" in "".join(caught.value.__notes__)
        assert kind is not OSError or caught.value.errno == errno.ENOSPC
    assert run_in_child(os.getpid) != os.getpid()


@pytest.mark.parametrize(("grace", "saved"), [(processes.GRACE_SECONDS, True), (0.1, False)])
def test_an_interrupted_child_saves_first_and_ends_in_any_case(tmp_path, monkeypatch, grace, saved):
    """Ended at once, a training loses all since its checkpoint; going on, it fights the next command for the folder."""
    begin, heard = time.monotonic(), []

    def note_and_interrupt(process: int) -> None:
        heard.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "GRACE_SECONDS", grace)
    with pytest.raises(KeyboardInterrupt):
        run_in_child(children.tidy_up_when_asked, str(tmp_path / "x"), on_message=note_and_interrupt)
    assert _is_gone(heard[0])
    assert (tmp_path / "x").exists() == saved
    assert time.monotonic() - begin < 8
    assert run_in_child(os.getpid) != os.getpid()


def test_an_interruption_does_not_wait_for_imports(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """On a slow disk the libraries take longer to import than the 10 s in which the command promises to end."""
    (tmp_path / "slow_module.py").write_text(
        "import os, time\nif 'KDLORA_TEST_SLOW' in os.environ:\n    time.sleep(60)\ndef work():\n    return 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(processes, "_SERVER_SECONDS", 0.2)
    work = importlib.import_module("slow_module").work
    run_in_child(os.getpid)  # the server is up
    monkeypatch.setenv("KDLORA_TEST_SLOW", "yes")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    begin = time.monotonic()
    threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,)).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_child(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 4
    monkeypatch.delenv("KDLORA_TEST_SLOW")
    assert run_in_child(work) == 1


def test_a_killed_server_takes_its_child_along(tmp_path):
    """An orphan that trains on would write into the folder that the next command works in."""
    heard: list[int] = []

    def kill_server(process: int) -> None:
        heard.append(process)
        processes._shared.servers[0].process.kill()

    with pytest.raises(ChildDiedError, match=r"exit status 1|killed by SIGKILL"):
        run_in_child(children.sleep_and_write, str(tmp_path / "x"), on_message=kill_server)
    assert _is_gone(heard[0])
    assert run_in_child(os.getpid) != os.getpid()


def test_temporary_files_of_children_go(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Children end without tidying up, and those that are killed cannot: a night of runs would fill the disk."""
    close_server()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    abandoned = tmp_path / f"kdlora-scratch-{owned_name().split('-')[0]}-999999999-1-0123abcd"
    abandoned.mkdir()
    paths = run_in_child(children.name_temporary_file)
    assert all(Path(path).parent.parent == tmp_path and Path(path).exists() for path in paths)
    assert not abandoned.exists()
    close_server()
    assert list(tmp_path.iterdir()) == []


def test_temporary_files_of_a_long_training_have_a_new_date(tmp_path, monkeypatch: pytest.MonkeyPatch):
    """Another container took them for abandoned after a day, and the suite ended where it next wrote a row."""
    monkeypatch.setattr(processes, "_TOUCH_SECONDS", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    os.utime(tmp_path, (1.0, 1.0))
    (requests, kept), (ended, other) = os.pipe(), os.pipe()
    child = os.posix_spawn(sys.executable, [sys.executable, "-c", "import time; time.sleep(0.3)"], os.environ)
    with os.fdopen(requests, "rb") as asked:
        assert processes._wait(child, asked, ended) == 0
    for pipe in (kept, ended, other):
        os.close(pipe)
    assert time.time() - tmp_path.stat().st_mtime < 60


def test_a_worker_that_was_forked_leaves_its_parents_server_alone(way):
    """A pool's worker removed the folder of temporary files under its parent, whose children then failed."""
    if way == "started":
        pytest.skip("nothing forks here")
    run_in_child(children.name_temporary_file)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(run_in_child, (children.name_temporary_file,))
    assert all(Path(path).exists() for path in run_in_child(children.name_temporary_file))


def test_a_killed_parent_takes_its_child_along(tmp_path):
    """`kill -9` on the command must not leave a training behind."""
    script = (
        "import children\nfrom kdlora.system.children import run_in_child\n"
        f"run_in_child(children.sleep_and_write, {str(tmp_path / 'x')!r}, on_message=lambda p: print(p, flush=True))\n"
    )
    own = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    with subprocess.Popen([sys.executable, "-c", script], env=own, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
    assert _is_gone(child)


def _is_gone(process: int) -> bool:
    for _ in range(100):
        if not psutil.pid_exists(process):
            return True
        time.sleep(0.1)
    return False
