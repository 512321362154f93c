"""A graph of three operators whose table of weights may lie in another file, and folders that serve it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import tiny

LABELS = ("negative", "positive")


def build_folder(folder: Path, **config: Any) -> Path:
    """Write a folder with tokenizer and config, which lacks a graph yet."""
    folder.mkdir(parents=True)
    tokenizer = tiny.train_tokenizer("bert")
    tokenizer.save_pretrained(folder)
    settings = {"model_type": "bert", "id2label": dict(enumerate(LABELS)), "max_position_embeddings": 64} | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def table() -> np.ndarray:
    """Give a row of weights for each token."""
    return np.random.default_rng(0).normal(size=(len(tiny.train_tokenizer("bert")), len(LABELS))).astype(np.float32)


def build_graph(file: Path, *, location: str | None = None, nested: bool = False, output: str = "logits") -> Path:
    """Write a graph that looks up a row of weights for each token, and takes the mean.

    The weights lie in the graph or where `location` says; nested in an attribute of a node, tools forget to look at
    them. `output` may be no logits: `text`, `sequence`, `int`, or `one` row, whatever was asked.
    """
    weights = numpy_helper.from_array(table(), "table")
    if location is not None:
        weights.ClearField("raw_data")
        weights.data_location = TensorProto.EXTERNAL
        weights.external_data.add(key="location", value=location)
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("ReduceMean", ["rows"], ["logits"], axes=[1], keepdims=0),
    ]
    if nested:
        nodes.insert(0, helper.make_node("Constant", [], ["table"], value=weights))
    kinds = {"int": (TensorProto.INT64, ["batch", 2]), "text": (TensorProto.STRING, ["batch", 2])}
    kind, shape = kinds.get(output, (TensorProto.FLOAT, ["batch", 2]))
    value = helper.make_tensor_value_info(output, kind, shape)
    if output in kinds:
        nodes.append(helper.make_node("Cast", ["logits"], [output], to=kind))
    elif output == "sequence":
        nodes.append(helper.make_node("SequenceConstruct", ["logits"], [output]))
        value = helper.make_tensor_sequence_value_info(output, TensorProto.FLOAT, None)
    elif output == "one":
        nodes.append(helper.make_node("ReduceMean", ["logits"], [output], axes=[0], keepdims=1))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    graph = helper.make_graph(nodes, "tiny", [ids], [value], [] if nested else [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file.write_bytes(model.SerializeToString())
    assert onnx.load(file, load_external_data=False)
    return file


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)
