"""Model folders, tables of teacher outputs and command lines that must be refused."""

import pickle
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file

from experiments import Evil, edit_json
from tiny import build_model_folder


def _other_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({f"x.{name}": value for name, value in load_file(file).items()}, file, metadata={"format": "pt"})


def _only(folder: Path, *names: str) -> None:
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(folder / "owned")))


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", **changes)


def _cut(path: Path, to: int) -> None:
    path.write_bytes(path.read_bytes()[:to])


def _endless_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")


def _grow_tokenizer(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{index}" for index in range(50)])
    tokenizer.save_pretrained(folder)


def _other_family(folder: Path, family: str) -> None:
    """Transformers 5 builds a tokenizer of special tokens alone, and every text becomes [UNK] [UNK] [UNK]."""
    build_model_folder(family, folder)
    _only(folder, "config.json", "model.safetensors")


MODELS: list[tuple[Callable[[Path], Any], tuple[str, ...]]] = [
    (_only, ("expected config.json", "nothing")),
    (lambda f: (f / "config.json").unlink(), ("expected config.json",)),
    (lambda f: _cut(f / "config.json", 30), ("config.json is damaged", "line ")),
    (lambda f: (f / "config.json").write_text("[]"), ("config.json", "expected a JSON object, found list")),
    (_config(model_type="banana"), ("the configuration in", "banana")),
    (transformers.T5Config().save_pretrained, ("a decoder follows; expected one of the two", "teacher.logits")),
    (transformers.ViTConfig().save_pretrained, ("'vit'", "encoder", "no text classification")),
    (_config(model_type="x", auto_map={"AutoConfig": "c.C"}), ("trust_remote_code: true",)),
    (_config(dim=64), ("as its config.json describes it", "another shape")),
    (_config(n_heads=5), ("config",)),
    (_config(n_layers=-1), ("-1 layers",)),
    (_config(n_layers=3), ("tensors are missing", "layer.1")),
    (lambda f: (f / "model.safetensors").unlink(), ("and model.safetensors", "tokenizer.json")),
    (lambda f: (f / "model.safetensors").rename(f / "model.onnx"), ("expected config.json and model.safetensors",)),
    (lambda f: (f / "model.safetensors").rename(f / "x.safetensors"), ("no file named model.safetensors",)),
    (lambda f: _cut(f / "model.safetensors", 5000), ("the weights in", "cannot be read")),
    (_endless_header, ("weights",)),
    (_other_weights, ("are not those of a 'distilbert' encoder",)),
    (_pickled, ("pytorch_model.bin", "unpickles nothing", ".save_pretrained(FOLDER)")),
    (lambda f: _only(f, "config.json", "model.safetensors"), ("tokenizer",)),
    *((partial(_other_family, family=family), ("tokenizer",)) for family in ("bert", "roberta", "deberta-v2", "mpnet")),
    (_grow_tokenizer, ("they do not belong together",)),
    (lambda f: _cut(f / "tokenizer.json", 200), ("tokenizer",)),
    (lambda f: edit_json(f / "tokenizer_config.json", pad_token=None), ("padding token",)),
    (lambda f: (f / "config.json").rename(f / "adapter_config.json"), ("holds an adapter, not a model",)),
    (lambda f: (_only(f), (f / "train.tsv").touch()), ("expected config.json", "it holds train.tsv")),
]

NAMES: list[tuple[str, tuple[str, ...]]] = [
    ("./model", ("there is no folder", "Check the path")),
    ("someone/a-model", ("'someone/a-model'", "HF_HUB_OFFLINE is set", "hf download someone/a-model")),
    (__file__, ("there is no folder", "Check the path")),
    ("bert-base-uncsed", ("bert-base-uncsed",)),
    ("not a name", ("not a name", "there is no folder")),
    ("https://example.org/model", ("https://example.org/model",)),
    ("~nobody-here/model", ("there is no folder", "~nobody-here/model")),
    ("x" * 5000, ("xxx",)),
]

Row = dict[str, Any]


# `tests/distil/test_teacher_table.py` has the wrong columns, ids and numbers, in both formats.
TABLES: list[tuple[Callable[[list[Row]], list[Row] | str], tuple[str, ...]]] = [
    (lambda rows: rows[3:], ("3 of 64", "FIRST", "add the rows")),
    (lambda rows: "[1]\n", ("row 1", "expected a JSON object")),
    (lambda rows: '{"id": "\\ud800", "positive": 1, "negative": 0}', ("row 1", "half")),
    (lambda rows: "", ("is empty (0 bytes)",)),
]

COMMANDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (("rnu",), ("rnu",)),
    (("run", "--otu", "x"), ("--otu",)),
    (("run", "a.yaml", "b.yaml"), ("b.yaml",)),
    (("run",), ("data: this section or key is required",)),
    (("run", "--family", "bert"), ("--train FILE",)),  # and no keys of a config that nobody has seen
    (("run", "none.yaml"), ("none.yaml", "does not exist")),
    (("run", "."), ("cannot be read",)),
    (("validate", f"{__file__}/x"), ("cannot be read", "Not a directory")),
    (("run", "--train", "caf\udce9.csv", "--family", "bert"), ("data.train", "is UTF-8")),
    (("run", "--train", "~nobody-here/x.csv", "--family", "bert"), ("data.train", "does not exist")),
    (("run", "--train", "x.csv", "--family", "brt"), ("--family", "'bert'")),
    (("run", "--train", "x.csv", "--text", "a", "--text", "b", "--text", "c", "--family", "bert"), ("task.text",)),
    (("validate",), ("Missing argument", "'config'")),
    (("predict", "nowhere", "x.csv"), ("nowhere",)),
    (("predict", "{student}", "{train}", "--batch-size", "0"), ("batch",)),
    (("predict", "{student}", "{train}", "--text", "txet", "--to", "out.csv"), ("txet",)),
    (("predict", "{student}", "{train}", "--to", "out.xlsx"), ("out.xlsx",)),
    (("predict", "{student}", "{train}", "--to", "nowhere/deep/\x00"), ("",)),
    (("export", "nowhere", "--to", "x"), ("nowhere",)),
    (("export", "{student}", "--to", "x", "--format", "onix"), ("onnx",)),
    (("export", "{student}", "--to", "x"), ("--data",)),
    (("benchmark", "nowhere"), ("nowhere",)),
    (("benchmark", "{student}", "--threads", "0"), ("threads",)),
    (("evaluate", "nowhere", "{train}"), ("nowhere",)),
    (("report",), ("'experiment'",)),
]
