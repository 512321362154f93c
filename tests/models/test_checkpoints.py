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


def test_what_cannot_be_found_names_the_remedy():
    """A mistyped folder would end in a baffling message about repository names, an unreachable Hub in none at all."""
    assert "there is no folder './model'" in refusal("./model")
    message = refusal("someone/a-model")
    assert all(
        part in message for part in ("'someone/a-model'", "HF_HUB_OFFLINE is set", "hf download someone/a-model")
    )


def test_what_is_no_model_says_what_it_is(folder, tmp_path):
    """A weights file, a data folder or an adapter given as a model must be recognised by its content."""
    assert "there is no folder" in refusal(tmp_path / "nowhere" / "model")
    assert "is a file; a model is a folder" in refusal(folder / "model.safetensors")
    for name, expected in (
        ("train.tsv", "expected config.json, it holds train.tsv"),
        ("adapter_config.json", "holds an adapter, not a model"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        assert expected in refusal(tmp_path / name)


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def pickled(folder: Path, beside: str | None = None) -> None:
    """Leave a file that nobody may open; with no model.safetensors, transformers would fall back on it."""
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "model.safetensors").rename(folder / (beside or "gone"))


def rename_weights(folder: Path) -> None:
    """Key names that match nothing load without an error: the whole encoder is random."""
    weights = load_file(folder / "model.safetensors")
    save_file({f"other.{key}": value for key, value in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def drop_padding(folder: Path) -> None:
    """Without a padding token the first batch of unlike lengths fails, an hour later."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def grow_tokenizer(folder: Path) -> None:
    """Token ids beyond the embeddings end in an index error deep inside the model; within them, in noise."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"extra{index}" for index in range(50)])
    tokenizer.save_pretrained(folder)


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


SPOILT = {
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights", "tokenizer.json"]),
    "pickled": (pickled, ["pytorch_model.bin", "convert it to safetensors"]),
    "pickled beside others": (lambda f: pickled(f, "x.safetensors"), ["no file named model.safetensors"]),
    "of another framework": (
        lambda f: (f / "model.safetensors").rename(f / "model.onnx"),
        ["only weights that PyTorch does not read (model.onnx)"],
    ),
    "half a config": (
        lambda f: (f / "config.json").write_text('{"model_type": "bert",'),
        ["config.json is damaged", "line 1"],
    ),
    "a list": (lambda f: (f / "config.json").write_text("[]"), ["expected a JSON object, found list"]),
    "cut weights": (cut_weights, ["the weights in", "cannot be read"]),
    "of the future": (lambda f: change_config(f, model_type="bert-of-the-future"), ["the configuration in"]),
    "T5": (transformers.T5Config().save_pretrained, ["generates text; expected an encoder"]),
    "GPT-2": (transformers.GPT2Config().save_pretrained, ["teacher.logits"]),
    "ViT": (transformers.ViTConfig().save_pretrained, ["no text classification"]),
    "CLIP": (transformers.CLIPConfig().save_pretrained, ["no text classification"]),
    "no padding": (drop_padding, ["has no padding token"]),
    "another tokenizer": (grow_tokenizer, ["they do not belong together"]),
    "another size": (
        lambda f: change_config(f, intermediate_size=48),
        ["do not fit its config.json", "intermediate.dense"],
    ),
    "a layer missing": (lambda f: change_config(f, num_hidden_layers=3), ["tensors are missing", "layer.2"]),
    "another model's weights": (rename_weights, ["are not those of a 'bert' encoder"]),
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_spoilt_folder_is_refused_with_its_fault(folder, spoil):
    """Most of these load without an error, over random layers or another tokenizer, or run the code of a pickle."""
    change, expected = SPOILT[spoil]
    change(folder)
    message = refusal(folder)
    assert all(part in message for part in expected), message


def test_a_full_disk_is_not_the_models_fault(folder, monkeypatch):
    """A failure of the machine must not be reported as a user's mistake (exit status 1, not 2)."""

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        load_encoder(str(folder), tiny.task(), seed=0)


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
