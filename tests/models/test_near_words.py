"""Near words by a model's word vectors: pieces of three kinds of vocabulary, capitals and marks."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlora.data.augment import NEAR, augment_texts
from kdlora.errors import ModelError
from kdlora.models.near_words import near_words
from tiny import sentiment_rows

VECTORS = {
    "superb": (1.0, 0.0),
    "charming": (0.9, 0.4),
    "brilliant": (0.5, 0.8),
    "Superb": (1.0, 0.01),
    "awful": (-1.0, 0.0),
    "tedious": (0.2, -1.0),
}
PIECES = {
    "Ġ": (pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()),
    "▁": (pre_tokenizers.Metaspace(), decoders.Metaspace()),
}


@pytest.fixture
def near_folder(tiny_model_folder, tmp_path):
    """A function that saves a model in which the words of `VECTORS` alone have vectors, its pieces with a mark."""

    def make(mark="", **rest):
        folder = shutil.copytree(tiny_model_folder("bert"), tmp_path / str(len(list(tmp_path.iterdir()))))
        weights = load_file(folder / "model.safetensors")
        (name,) = (name for name in weights if name.endswith("word_embeddings.weight"))
        vectors = torch.zeros_like(weights[name])
        pieces = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
        if mark:
            words = [f"{mark}{word}" for word in VECTORS] + [
                f"{mark}caf\u00c3\u00a9" if mark == "Ġ" else "▁café",
                "sup",
            ]
            pieces = {piece: number for number, piece in enumerate(["[UNK]", "[PAD]", *words])}
            tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="[UNK]"))
            tokenizer.pre_tokenizer, tokenizer.decoder = PIECES[mark]
            PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]").save_pretrained(folder)
        for word, (first, second) in VECTORS.items():
            if f"{mark}{word}" in pieces:
                vectors[pieces[f"{mark}{word}"], :2] = torch.tensor([first, second])
        save_file(
            weights | {name: vectors} if not rest else {"other": vectors},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        return folder

    return make


def test_a_near_word_has_the_marks_and_the_capital_of_its_own(near_folder):
    """A word in capitals or before a comma would have no neighbours, and a far one is another text."""
    words = ["superb", "Superb,", "(SUPERB)", "awful", "xyz", "film", "--", "well-made"]
    found = near_words(str(near_folder()), words)
    assert found == {
        "superb": ["charming", "brilliant"],
        "Superb,": ["Charming,", "Brilliant,"],
        "(SUPERB)": ["(CHARMING)", "(BRILLIANT)"],
    }


@pytest.mark.parametrize("mark", ["Ġ", "▁"])
def test_pieces_of_bytes_and_of_sentencepiece(near_folder, mark):
    """Behind the mark of a word's beginning a piece would be no word, and without it a part would be one."""
    found = near_words(str(near_folder(mark)), ["superb", "charming"])
    assert found == {"superb": ["charming", "brilliant"], "charming": ["superb", "brilliant"]}


def test_a_model_without_word_vectors(near_folder, caplog):
    """Its copies are as they were; a folder that is no model is refused, as everywhere."""
    assert near_words(str(near_folder(lost=True)), ["superb"]) == {}
    assert "has no word vectors that can be read" in caplog.text
    assert near_words(str(near_folder()), ["xyz"]) == {}
    with pytest.raises(ModelError, match="there is no folder 'no/such/model'"):
        near_words("no/such/model", ["superb"])


def test_copies_have_near_words(near_folder):
    """They were made of the training texts' own words alone, so a student never saw what others say."""
    from datasets import Dataset

    rows = [row for row in sentiment_rows(400) if "superb" in row["text"]]
    texts = Dataset.from_dict({"id": [row["id"] for row in rows], "text": [row["text"] for row in rows]})
    plain, near = (augment_texts(texts, 100, near_by=model)["text"][:] for model in (None, str(near_folder())))
    assert not any("charming" in text or "brilliant" in text for text in plain)
    kept, other = (sum(text.count(word) for text in near) for word in ("superb", "charming"))
    other += sum(text.count("brilliant") for text in near)
    assert other / (kept + other) == pytest.approx(NEAR, abs=0.05)
    assert any("charming!" in text for text in near)
