"""Students made from a teacher's layers: the right layers, and a model that loads again as itself."""

from __future__ import annotations

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import tiny
from kdlora.errors import ModelError
from kdlora.models.encoders import find_layers, load_encoder, save_encoder, student_from_layers

TASK = tiny.task(names=("bad", "so-so", "good"))


@pytest.mark.parametrize("family", tiny.FAMILIES + tiny.VARIANTS)
def test_all_layers_are_the_model_itself(tiny_model_folder, family):
    """Anything that is not copied (embeddings, relative positions, a pooler) would show here."""
    source = str(tiny_model_folder(family, layers=4))
    whole = load_encoder(source, TASK, seed=2)
    same = student_from_layers(source, [0, 1, 2, 3], TASK, seed=2)
    assert torch.equal(tiny.logits(same.model, same.tokenizer), tiny.logits(whole.model, whole.tokenizer))
    assert same.fresh == whole.fresh


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_chosen_layers_are_kept_in_order(tiny_model_folder, family):
    """A student of layers 0 and 1 would train as well, and nobody see the difference."""
    source = str(tiny_model_folder(family, layers=4))
    whole = load_encoder(source, TASK, seed=2)
    parent, _, child = find_layers(whole.model)[0].rpartition(".")
    layers = whole.model.get_submodule(f"{parent}.{child}")
    setattr(whole.model.get_submodule(parent), child, nn.ModuleList([layers[0], layers[3]]))  # cut in place
    student = student_from_layers(source, [0, 3], TASK, seed=2)
    expected = tiny.logits(whole.model, whole.tokenizer)
    assert torch.allclose(tiny.logits(student.model, student.tokenizer), expected, atol=1e-6)
    assert student.model.config.num_hidden_layers == 2
    assert student.layers == (0, 3)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_student_loads_again_as_itself(tiny_model_folder, tmp_path, family):
    """ModernBERT's first layer has no norm: cut in place, the student would be another model once reloaded."""
    if family == "modernbert" and Version(transformers.__version__) < Version("5.20"):
        pytest.skip("some transformers before 5.20 refuse the ModernBERT config that they have written themselves")
    student = student_from_layers(str(tiny_model_folder(family, layers=4)), [1, 3], TASK, seed=2)
    save_encoder(student, tmp_path)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(tiny.logits(again, student.tokenizer), tiny.logits(student.model, student.tokenizer))


def test_modernbert_layers_keep_their_reach(tiny_model_folder):
    """A layer pretrained on a window of tokens would be run over the whole text."""
    source = str(tiny_model_folder("modernbert", layers=4))
    student = student_from_layers(source, [0, 1, 3], TASK, seed=0).model
    assert student.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_settings_that_merely_look_like_layers_are_left_alone(tiny_model_folder):
    """DeBERTa's two kinds of position attention are not its two layers."""
    student = student_from_layers(str(tiny_model_folder("deberta-v2", layers=2)), [1], TASK, seed=0).model
    assert student.config.pos_att_type == ["p2c", "c2p"]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([0, 2], r"names layer 2, but .* has 2 layers: 0 to 1"),
        ([-1], "names layer -1"),
        ([1, 0], r"increasing indices without repetition, such as \[0, 1\]"),
        ([0, 0], "without repetition"),
    ],
)
def test_impossible_choices_are_refused(tiny_model_folder, layers, message):
    """Python would take -1 for the last layer, and slicing forgive the rest."""
    with pytest.raises(ModelError, match=message):
        student_from_layers(str(tiny_model_folder("bert")), layers, TASK, seed=0)


def test_shared_layers_cannot_be_chosen():
    """ALBERT runs one layer many times: there is nothing to cut."""
    sizes = {"vocab_size": 64, "embedding_size": 8, "hidden_size": 16, "intermediate_size": 16}
    config = transformers.AlbertConfig(**sizes, num_hidden_layers=4, num_attention_heads=2)
    with pytest.raises(ModelError, match="expected one list of 4 layers, found none"):
        find_layers(transformers.AlbertForSequenceClassification(config))
