"""Checkpoints: faults of the machine, code of their own, threads. The bad ones: `tests/faults/corpus_models.py`."""

import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers

import tiny
from experiments import edit_json
from kdlora.deploy.folder import read_model_folder
from kdlora.deploy.torch_backend import TorchBackend
from kdlora.models.encoders import load_encoder


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A BERT checkpoint of one's own, to be spoilt."""
    return Path(shutil.copytree(tiny_model_folder("bert"), tmp_path / "model"))


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


def test_own_code_with_leave_is_loaded_like_any_other(folder):
    """The one switch must be enough, and the new head must still come from the seed."""
    code = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnForSequenceClassification"}
    edit_json(folder / "config.json", model_type="own", auto_map=code)
    (folder / "own.py").write_text(OWN_CODE)
    encoder = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    again = load_encoder(str(folder), tiny.task(), seed=0, trust_remote_code=True)
    assert type(encoder.model).__name__ == "OwnForSequenceClassification"
    assert encoder.fresh == ("classifier",)
    assert torch.equal(encoder.model.classifier.weight, again.model.classifier.weight)


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
    ways = [lambda: load_encoder(folder, tiny.task(), seed=0), lambda: TorchBackend(read_model_folder(tmp_path))] * 2
    threads = [threading.Thread(target=way) for way in ways]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]
    assert transformers.PreTrainedModel.tie_weights is tie_weights
