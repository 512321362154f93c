"""Suite, search and labelling on a real Ray of this machine, a node or a worker killed on the way."""

import contextlib
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdlora.errors import ConfigError, DataError
from kdlora.experiment.engines import check_nodes, connect
from kdlora.experiment.jobs import Outcome
from kdlora.experiment.labelling import LabelSettings, label_collection
from kdlora.experiment.suite import run_suite
from kdlora.experiment.suitefile import build_suite
from kdlora.searchconfig import Resources
from tiny import sentiment_rows

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STORE = 80 * 1024 * 1024


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each; the second one is killed by the test that comes last."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": STORE})
    made.second = made.add_node(num_cpus=1, object_store_memory=STORE)
    made.wait_for_nodes()
    yield made
    ray.shutdown()
    made.shutdown()


def test_an_address_that_does_not_answer_is_told_in_seconds(suite_values, tmp_path, monkeypatch):
    """Ray itself tries for most of a minute, and then says that a handshake failed."""
    start = time.perf_counter()
    for address in ("ray://127.0.0.1:1", "ray"):
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:2")
        with pytest.raises(ConfigError, match=r"no Ray cluster answers at (ray://127\.0\.0\.1:1|127\.0\.0\.1:2) "):
            run_suite(build_suite(suite_values()), tmp_path / "suite", on=address)
    assert time.perf_counter() - start < 10


def test_what_a_cluster_lacks_is_told_before_anything_runs(cluster, suite_values, tmp_path, monkeypatch):
    """Ray waits without end for a node that has what is asked for, and fails run by run where data are missing."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    needs = {"resources": {"gpus": 1}}
    with pytest.raises(ConfigError, match="a run needs 1 cores and 1 GPUs"):
        run_suite(build_suite(suite_values(**needs)), tmp_path / "suite", on="ray")
    joined = connect("ray")
    with pytest.raises(ConfigError, match=r"(?s)every node needs the same folders.*lacks /nowhere"):
        check_nodes(joined, ["/nowhere"], Resources())
    joined.shutdown()


def test_a_killed_node_loses_nothing_and_doubles_nothing(cluster, suite_values, finished_suite, tmp_path, monkeypatch):
    """A cluster whose figures differ from one machine's, or that forgets runs with a node, is worth nothing."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    ended: list[Outcome] = []
    killed = threading.Event()

    def listen(event):
        if isinstance(event.detail, Outcome):
            ended.append(event.detail)
            if not killed.is_set():
                killed.set()
                cluster.remove_node(cluster.second, allow_graceful=False)

    result = run_suite(build_suite(suite_values()), tmp_path / "suite", on="ray", listen=listen)
    assert killed.is_set()
    assert not result.failed
    keys = [(outcome.job.kind, outcome.job.key) for outcome in ended]
    assert len(keys) == len(set(keys)) == 9
    scores = {key: record.score for key, record in result.records.items()}
    assert scores == {key: record.score for key, record in finished_suite.records.items()}
    tables = [(folder / "table1.csv").read_text(encoding="utf-8") for folder in (result.folder, finished_suite.folder)]
    assert tables[0] == tables[1]
    again = run_suite(build_suite(suite_values()), tmp_path / "suite")
    assert again.reused == 8


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Forty shards of rows in one Parquet file."""
    rows = [{"id": row["id"], "text": row["text"]} for row in sentiment_rows(320)]
    file = tmp_path_factory.mktemp("ray-texts") / "texts.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=8)
    return str(file)


def kill_a_worker(folder, killed):
    """Wait for the first shard, then kill a process that holds the model."""
    import psutil

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:  # between two pieces a worker is idle, and has another name
        for process in psutil.Process().children(recursive=True) if list(folder.glob("*.parquet.json")) else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                if "ray::_carry_out" in " ".join(process.cmdline()):
                    process.kill()
                    killed.append(process.pid)
                    return
        time.sleep(0.01)


def test_a_lost_worker_loses_no_row_and_doubles_none(model, texts, tmp_path):
    """A piece that dies with its worker must be done again by another, once."""
    label_collection(str(model), texts, tmp_path / "here", LabelSettings(rows_per_shard=8))
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_worker, args=(tmp_path / "there", killed))
    thread.start()
    summary = label_collection(str(model), texts, tmp_path / "there", LabelSettings(rows_per_shard=8), on="ray")
    thread.join()
    assert len(killed) == 1
    assert (summary.rows, summary.shards) == (320, 40)
    for file in sorted((tmp_path / "here").glob("logits-*.parquet")):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()


def test_faults_come_back_in_our_words(model, tmp_path):
    """Ray wraps what a worker raises in pages of its own."""
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "a film"}\n{"text": null}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 2: column 'text' is empty or missing"):
        label_collection(str(model), str(file), tmp_path / "out", LabelSettings(strict=True), on="ray")
