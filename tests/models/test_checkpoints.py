"""Folders and names that are no model for us: each is refused with the reason and the remedy."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path

import loads
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import tiny
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.torch_backend import load_model
from kdlora.errors import ModelError
from kdlora.models.encoders import load_encoder, load_fine_tuned
from kdlora.system.children import run_in_child


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A BERT checkpoint of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_model_folder("bert"), tmp_path / "model"))


def refusal(source: object, **options: object) -> str:
    with pytest.raises(ModelError) as caught:
        load_encoder(str(source), tiny.task(), seed=0, **options)
    return str(caught.value)


def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(tmp_path):
    """A mistyped folder would end in a baffling message about repository names."""
    assert "there is no folder" in refusal(tmp_path / "nowhere" / "model")
    assert "there is no folder './model'" in refusal("./model")


def test_an_unreachable_hub_names_the_remedy():
    """Offline, transformers' own message does not say which model, nor what to do."""
    message = refusal("someone/a-model")
    assert "'someone/a-model'" in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "hf download someone/a-model" in message


def test_a_file_is_not_a_model(folder):
    """The weights file in place of its folder would be taken for a Hub id."""
    assert "is a file; a model is a folder" in refusal(folder / "model.safetensors")


def test_a_folder_without_config_says_what_it_holds(tmp_path):
    """A data folder given as a model must be recognised by its content."""
    (tmp_path / "train.tsv").touch()
    message = refusal(tmp_path)
    assert "expected config.json" in message
    assert "train.tsv" in message


def test_an_adapter_is_not_a_model(tmp_path):
    """An adapter folder has weights, but not those of an encoder."""
    (tmp_path / "adapter_config.json").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    assert "holds an adapter, not a model" in refusal(tmp_path)


def test_a_folder_without_weights_says_what_it_holds(folder):
    """Weights that were not copied would otherwise be random ones."""
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "no weights" in message
    assert "tokenizer.json" in message


def test_pickled_weights_are_refused_unopened(folder):
    """Unpickling runs whatever code the file holds."""
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "convert it to safetensors" in message


def test_pickled_weights_beside_foreign_safetensors_are_refused_unopened(folder):
    """With no model.safetensors, transformers would fall back on the pickle."""
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    assert "no file named model.safetensors" in refusal(folder)


def test_weights_for_another_framework_are_named(folder):
    """Only an ONNX file: there is something, yet nothing to train."""
    (folder / "model.safetensors").rename(folder / "model.onnx")
    assert "only weights that PyTorch does not read (model.onnx)" in refusal(folder)


def test_a_damaged_config_is_located(folder):
    """Half a download must not read like a missing model."""
    (folder / "config.json").write_text('{"model_type": "bert",')
    message = refusal(folder)
    assert "config.json is damaged" in message
    assert "line 1" in message
    (folder / "config.json").write_text("[]")
    assert "expected a JSON object, found list" in refusal(folder)


def test_damaged_weights_are_named(folder):
    """A truncated safetensors file is a fault of the file, not of kdlora."""
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:1000])
    assert f"the weights in {folder} cannot be read" in refusal(folder)


def test_a_full_disk_is_not_the_models_fault(folder, monkeypatch):
    """A failure of the machine must not be reported as a user's mistake (exit status 1, not 2)."""

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        load_encoder(str(folder), tiny.task(), seed=0)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.T5Config(), "generates text; expected an encoder"),
        (transformers.GPT2Config(), "teacher.logits"),
        (transformers.ViTConfig(), "no text classification"),
        (transformers.CLIPConfig(), "no text classification"),
    ],
)
def test_another_kind_of_model_is_refused(folder, config, expected):
    """T5 and GPT-2 load for classification, then train slowly to nothing that we can ship."""
    config.save_pretrained(folder)
    assert expected in refusal(folder)


def test_an_unknown_architecture_is_refused(folder):
    """A config from a newer library says so, and does not crash."""
    (folder / "config.json").write_text('{"model_type": "bert-of-the-future"}')
    assert "the configuration in" in refusal(folder)


OWN_CODE = """
from transformers import BertConfig, BertForSequenceClassification
class OwnConfig(BertConfig):
    model_type = "own"
class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig
"""


def with_own_code(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": code}))
    (folder / "own.py").write_text(OWN_CODE)
    return folder


def test_own_code_runs_only_with_leave(folder):
    """A model must not run its own code because somebody named it in a config."""
    message = refusal(with_own_code(folder))
    assert "trust_remote_code: true" in message


def test_own_code_with_leave_is_loaded_like_any_other(folder):
    """The one switch must be enough, and the new head must still come from the seed."""
    with_own_code(folder)
    encoder = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    again = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    assert type(encoder.model).__name__ == "OwnForSequenceClassification"
    assert encoder.fresh == ("classifier",)
    assert torch.equal(encoder.model.classifier.weight, again.model.classifier.weight)


@pytest.mark.parametrize("family", ["bert", "roberta", "deberta-v2", "mpnet"])
def test_a_missing_tokenizer_is_not_replaced_by_an_empty_one(tiny_model_folder, tmp_path, family):
    """Transformers 5 builds a tokenizer of special tokens alone, and every text becomes [UNK] [UNK] [UNK]."""
    folder = Path(shutil.copytree(tiny_model_folder(family), tmp_path / "model"))
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert "tokenizer" in refusal(folder)


def test_a_tokenizer_without_padding_is_refused(folder):
    """Without a padding token the first batch of unlike lengths fails, an hour later."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "has no padding token" in refusal(folder)


def test_a_tokenizer_of_another_model_is_refused(folder):
    """Token ids beyond the embeddings end in an index error deep inside the model; within them, in noise."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{index}" for index in range(50)])
    tokenizer.save_pretrained(folder)
    assert "they do not belong together" in refusal(folder)


def test_weights_of_another_size_are_refused(folder):
    """ignore_mismatched_sizes, which the head needs, would leave random embeddings without a word."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 48
    config.save_pretrained(folder)
    message = refusal(folder)
    assert "do not fit its config.json" in message
    assert "intermediate.dense" in message


def test_weights_with_a_layer_missing_are_refused(folder):
    """A config that says more layers than the file has would train over random layers."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 3
    config.save_pretrained(folder)
    message = refusal(folder)
    assert "tensors are missing" in message
    assert "layer.2" in message


def test_weights_of_another_model_are_refused(folder):
    """Key names that match nothing load without an error: the whole encoder is random."""
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{key}": value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert "are not those of a 'bert' encoder" in refusal(folder)


def test_a_fine_tuned_model_is_checked_alike(tmp_path):
    """The teacher that is given takes the same road as the one that is trained."""
    with pytest.raises(ModelError, match="there is no folder"):
        load_fine_tuned(str(tmp_path / "nowhere"), tiny.task())


def test_threads_load_one_after_the_other(tiny_model_folder, tmp_path, monkeypatch):
    """Two at once leave transformers' classes as one of them had changed them: later models are tied no more."""
    folder = str(tiny_model_folder("bert"))
    encoder = load_encoder(folder, tiny.task(), seed=0)
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    automatic, tie_weights = transformers.AutoModelForSequenceClassification, transformers.PreTrainedModel.tie_weights
    original, at_once, most = automatic.from_pretrained, [], []

    def load(*arguments, **options):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.05)
        try:
            return original(*arguments, **options)
        finally:
            at_once.pop()

    monkeypatch.setattr(automatic, "from_pretrained", load)
    ways = [lambda: load_encoder(folder, tiny.task(), seed=0), lambda: load_model(read_model_folder(tmp_path))] * 2
    threads = [threading.Thread(target=way) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert transformers.PreTrainedModel.tie_weights is tie_weights


@pytest.mark.skipif(
    not hasattr(loads.conversion_mapping, "_checkpoint_conversion_mapping_cache"),
    reason="this version of transformers keeps its patterns elsewhere",
)
def test_runs_find_the_patterns_compiled():
    """Each run of an experiment would compile the same thousand patterns before it reads its weights."""
    assert run_in_child(loads.has_patterns)
