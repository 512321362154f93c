"""A Hub with tiny models under their real names, a language model that answers, an environment that sees both."""

import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

import hub_standin
import llm_standin
import tiny
from deploy_folders import build_classifier

QUICK = Path(__file__).with_name("quick")
ENCODERS = {
    "bert-base-uncased": ("bert", 2),
    "distilbert-base-uncased": ("distilbert", 1),
    "roberta-base": ("roberta", 2),
    "distilroberta-base": ("roberta", 1),
    "sentence-transformers/all-MiniLM-L6-v2": ("bert", 6),
    "sentence-transformers/all-mpnet-base-v2": ("mpnet", 2),
    "sentence-transformers/paraphrase-MiniLM-L3-v2": ("bert", 3),
}
FINE_TUNED = "distilbert-base-uncased-finetuned-sst-2-english"
GLUE_CARD = """---
configs:
- config_name: mrpc
  data_files: [{split: train, path: mrpc/train-*}, {split: validation, path: mrpc/validation-*}]
- config_name: sst2
  data_files: [{split: train, path: sst2/train-*}, {split: validation, path: sst2/validation-*}]
---
"""


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[hub_standin.StandIn, str]]:
    """The stand-in of the Hub, filled, and the address of one of a language model, which speaks the chat protocol."""
    with hub_standin.running() as hub, llm_standin.running() as model:
        _fill(hub, tmp_path_factory.mktemp("models"))
        yield hub, model.url.removesuffix("/v1")


@pytest.fixture
def reader(servers, tmp_path_factory) -> dict[str, str]:
    """The environment of somebody who follows a page."""
    hub, language_model = servers
    cache = tmp_path_factory.mktemp("cache")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own = hub_standin.environment(hub, str(cache)) | {"LLM_URL": language_model, "PATH": path, "COLUMNS": "120"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(QUICK), os.environ.get("PYTHONPATH")]))
    own["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # of examples that call `datasets` themselves: the counter is elsewhere
    return {**os.environ, **own, "JUPYTER_PLATFORM_DIRS": "1", "IPYTHONDIR": str(cache / "ipython")}


def _fill(server: hub_standin.StandIn, folder: Path) -> None:
    """Put every model and data set there."""
    for name, (family, layers) in ENCODERS.items():
        _add_folder(server, name, tiny.build_model_folder(family, folder / name.replace("/", "-"), layers=layers))
    fine_tuned = build_classifier("distilbert", folder / "fine-tuned", names=("NEGATIVE", "POSITIVE"))
    _add_folder(server, FINE_TUNED, fine_tuned)
    files = {"README.md": GLUE_CARD.encode()}
    for split, count, seed in (("train", 96, 0), ("validation", 48, 1)):
        files[f"mrpc/{split}-00000-of-00001.parquet"] = _pairs(count, seed).to_parquet()
        files[f"sst2/{split}-00000-of-00001.parquet"] = _sentences(count, seed).to_parquet()
    server.add("nyu-mll/glue", files, kind="datasets")


def _add_folder(server: hub_standin.StandIn, name: str, folder: Path) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    server.add(name, files | {"README.md": b"---\nlicense: apache-2.0\n---\nA stand-in.\n"})


def _pairs(count: int, seed: int) -> pd.DataFrame:
    draw, texts = random.Random(seed), [row["text"] for row in tiny.sentiment_rows(count, seed)]
    labels = [draw.randint(0, 1) for _ in texts]
    others = [text if label else draw.choice(texts) for text, label in zip(texts, labels, strict=True)]
    return pd.DataFrame({"sentence1": texts, "sentence2": others, "label": labels, "idx": range(count)})


def _sentences(count: int, seed: int) -> pd.DataFrame:
    rows = tiny.sentiment_rows(count, seed)
    labels = [int(row["label"] == "positive") for row in rows]
    return pd.DataFrame({"sentence": [row["text"] for row in rows], "label": labels, "idx": range(count)})
