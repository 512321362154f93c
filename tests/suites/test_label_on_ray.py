"""Labelling on a real Ray of this machine, one of its workers killed on the way."""

from __future__ import annotations

import os
import signal
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdlora.errors import ConfigError, DataError
from kdlora.experiment.labelling import label_collection
from kdlora.models.encoders import load_encoder, save_encoder
from tiny import sentiment_rows, task

ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def model(tiny_model_folder, tmp_path_factory):
    """A classifier with random weights."""
    folder = tmp_path_factory.mktemp("ray-model") / "teacher"
    encoder = load_encoder(str(tiny_model_folder("bert")), task(), seed=3)
    encoder.model.config.kdlora_task = task().to_dict()
    save_encoder(encoder, folder)
    return str(folder)


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
    while not list(folder.glob("*.parquet.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        if "Labeller" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
            killed.append(process.pid)
            return


def test_a_lost_worker_loses_no_row_and_doubles_none(model, texts, tmp_path):
    """A piece that dies with its worker must be done again by another, once."""
    label_collection(model, texts, tmp_path / "here", rows_per_shard=8)
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_worker, args=(tmp_path / "there", killed))
    thread.start()
    summary = label_collection(model, texts, tmp_path / "there", rows_per_shard=8, on="ray")
    thread.join()
    assert len(killed) == 1
    assert (summary.rows, summary.shards) == (320, 40)
    for file in sorted((tmp_path / "here").glob("logits-*.parquet")):
        assert (tmp_path / "there" / file.name).read_bytes() == file.read_bytes()


def test_faults_come_back_in_our_words(model, texts, tmp_path):
    """Ray wraps what a worker raises in pages of its own."""
    with pytest.raises(DataError, match="no column 'body'"):
        label_collection(model, texts, tmp_path / "out", text=["body"], on="ray")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at ray://127\.0\.0\.1:1 "):
        label_collection(model, texts, tmp_path / "nobody", on="ray://127.0.0.1:1")
