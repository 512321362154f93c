"""Whole classifier folders of every family, in transformers' layout, for the tests of this room."""

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tiny import sentiment_rows, tiny_config, train_tokenizer

TEXTS = [row["text"] for row in sentiment_rows(60)]
LONG = "wonderful story " * 60
PAIRS = [(TEXTS[row], TEXTS[row + 1]) for row in range(12)]

PROBLEMS = {
    "single-label": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
    "tokens": None,
}
LABELS = {
    "single-label": ("negative", "neutral", "positive"),
    "regression": ("score",),
    "multi-label": ("joy", "anger", "fear"),
    "tokens": ("O", "B-LOC", "I-LOC", "B-PER", "I-PER"),
}


def build_classifier(family: str, folder: Path, *, kind: str = "single-label", names: Sequence[str] = ()) -> Path:
    """Save a tiny classifier with a spread-out random head, whose predictions differ from text to text."""
    tokenizer = train_tokenizer(family)
    config = tiny_config(family, -(-len(tokenizer) // 8) * 8)
    names = names or LABELS[kind]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: column for column, name in enumerate(names)}
    config.problem_type = PROBLEMS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = "Token" if kind == "tokens" else "Sequence"
        model = getattr(transformers, f"AutoModelFor{head}Classification").from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4.0)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
            _spread_logits(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _spread_logits(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerFast) -> None:
    """Scale the last layer so that the logits of our texts have mean 0 and standard deviation 2."""
    texts = [row["text"] for row in sentiment_rows(40)]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    logits = model(**inputs).logits.flatten(0, -2)
    scale = 2.0 / logits.std(dim=0)
    head.weight.mul_(scale[:, None])
    head.bias.mul_(scale).sub_(logits.mean(dim=0) * scale)
