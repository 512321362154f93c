"""Tiny but real: a trained tokenizer, model folders of nine families as a hub has them, a learnable data set."""

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from kdlora.data.tasks import Task

FAMILIES = ("bert", "distilbert", "roberta", "deberta-v2", "electra", "mpnet", "modernbert")
"""The families that kdlora promises; `tiny_model_folder` builds each of them."""

DECODERS = ("llama", "gpt2")
"""Two that read from left to right: heads of queries that share keys, and layers that are no `nn.Linear`."""

VARIANTS = ("bert-without-pooler",)
"""Checkpoints that lack a module which the classifier needs, besides the head."""

GOOD = ("wonderful", "delightful", "superb", "charming", "brilliant", "moving")
BAD = ("dreadful", "boring", "clumsy", "awful", "lifeless", "tedious")
SUBJECTS = ("film", "story", "plot", "acting", "music", "ending", "naïve café scene", "Straße in Zürich")
TEMPLATES = (
    "the {subject} was {word} and I stayed until the end",
    "what a {word} {subject}",
    "I found the {subject} {word}, as did my friends",
    "{word}! that is all one can say about this {subject}",
    "a {subject} so {word} that the audience talked about it for 2 hours",
)
OTHER_TEXT = (
    "a man is playing a guitar on the stage",
    "the company said its profit rose by 12 percent in the third quarter",
    "does the sentence entail the hypothesis? it does not",
    "where was the treaty signed? in Paris, 1763 (again in 1783)",
    "日本語 の テキスト も あります",
    "Привет, мир — déjà vu, smörgåsbord, 100 € & more…",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
PAD_IS_ONE = ("roberta", "mpnet")
"""These count positions from the padding token's id on, which is 1; MPNet has it fixed in its code."""
WITHOUT_TOKEN_TYPES = ("distilbert", "roberta", "mpnet", "modernbert", *DECODERS)


def sentiment_rows(count: int = 200, seed: int = 0) -> list[dict[str, str]]:
    """Make balanced rows whose label follows from one word, so that a tiny model can learn them."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        label, words = (("positive", GOOD), ("negative", BAD))[index % 2]
        text = draw.choice(TEMPLATES).format(subject=draw.choice(SUBJECTS), word=draw.choice(words))
        rows.append({"id": f"r{index}", "text": text, "label": label})
    draw.shuffle(rows)
    return rows


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as a UTF-8 CSV file with a header; the columns are those of the first row."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def train_tokenizer(family: str = "bert") -> transformers.PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer from the words and characters of this module's texts.

    The library's own trainer breaks ties by hash, and so gives another vocabulary in every process.
    """
    special = [SPECIAL[index] for index in ((2, 0, 3, 1, 4) if family in PAD_IS_ONE else range(5))]
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    texts = [row["text"] for row in sentiment_rows(400)] + list(OTHER_TEXT)
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    characters = {character for word in words for character in word}
    pieces = special + sorted(words | characters | {f"##{character}" for character in characters})
    tokenizer = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    decodes = family in DECODERS
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A" if decodes else "[CLS] $A [SEP]",
        pair="[CLS] $A $B" if decodes else "[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names, named = ["input_ids", "attention_mask"], {f"{token[1:-1].lower()}_token": token for token in special}
    if family not in WITHOUT_TOKEN_TYPES:
        names.insert(1, "token_type_ids")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=64,
        model_input_names=names,
        **({"padding_side": "left", "bos_token": "[CLS]", "eos_token": "[SEP]"} if decodes else named),
    )


def tiny_config(family: str, vocab_size: int, *, layers: int = 2) -> transformers.PretrainedConfig:
    """Give the configuration of a tiny model with the traits of its family (shared keys, local attention, …)."""
    common = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 66,
        "pad_token_id": 1 if family in PAD_IS_ONE else 0,
        "bos_token_id": 0 if family in PAD_IS_ONE else 2,
        "eos_token_id": 2 if family in PAD_IS_ONE else 3,
    }
    deberta = {"type_vocab_size": 0, "relative_attention": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"}
    deberta |= {"share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    dropout = dict.fromkeys(("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"), 0.1)
    own: dict[str, dict[str, Any]] = {
        "bert": {},
        "bert-without-pooler": {"model_type": "bert"},
        "distilbert": {"dim": 32, "n_layers": layers, "n_heads": 2, "hidden_dim": 64},
        "roberta": {"type_vocab_size": 1},
        "deberta-v2": deberta,
        "electra": {"embedding_size": 16},
        "mpnet": {},
        "llama": {"num_key_value_heads": 1},
        "eurobert": {"num_key_value_heads": 1},
        "gpt2": {"n_embd": 32, "n_layer": layers, "n_head": 2, "n_positions": 66},
        "modernbert": {"sep_token_id": 3, "local_attention": 8, "global_attn_every_n_layers": 2, **dropout},
    }
    if family == "distilbert":
        common = {name: common[name] for name in ("vocab_size", "max_position_embeddings", "pad_token_id")}
    elif family == "gpt2":
        common = {name: common[name] for name in ("vocab_size", "bos_token_id", "eos_token_id")}
    elif family == "llama":
        del common["pad_token_id"]
    elif family == "modernbert":
        common["cls_token_id"] = 2
    return transformers.AutoConfig.for_model(**{"model_type": family, **common, **own[family]})


_PRETRAINED_CLASS = {
    "bert": "BertForPreTraining",
    "bert-without-pooler": "BertForMaskedLM",
    "distilbert": "DistilBertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
    "electra": "ElectraForPreTraining",
    "mpnet": "MPNetModel",
    "modernbert": "ModernBertForMaskedLM",
    "llama": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}


def build_model_folder(family: str, folder: Path, *, layers: int = 2) -> Path:
    """Save a tiny *pretrained* checkpoint: encoder weights and tokenizer, no classification head."""
    tokenizer = train_tokenizer(family)
    config = tiny_config(family, -(-len(tokenizer) // 8) * 8, layers=layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, _PRETRAINED_CLASS[family])(config)
        with torch.no_grad():  # spread the weights, or every text looks alike to so small a model
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1 and "embed" not in name:
                    parameter.mul_(4.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def task(kind: str = "single-label", names: Sequence[str] = ("negative", "positive")) -> Task:
    """Give a task on a `text` column; regression has the one name `label`."""
    metric = {"single-label": "accuracy", "regression": "pearson", "multi-label": "micro_f1"}[kind]
    labels = ("label",) if kind == "regression" else tuple(names)
    return Task(kind=kind, text=("text",), label=("label",), label_names=labels, metrics=(metric,))


def save_classifier(source: Path, folder: Path) -> Path:
    """Save a classifier of `task()` as an experiment ships it; its head is random."""
    from kdlora.models.encoders import load_encoder, save_encoder

    encoder = load_encoder(str(source), task(), seed=3)
    encoder.model.config.kdlora_task = task().to_dict()
    save_encoder(encoder, folder)
    return folder


def batch(tokenizer: transformers.PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Give two texts of unlike length as tensors, padded."""
    texts = ["the film was wonderful", "what a dreadful story, as the company said in the third quarter"]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def logits(model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """Give the model's logits on `batch`, dropout off."""
    with torch.no_grad():
        return model.eval()(**batch(tokenizer)).logits
