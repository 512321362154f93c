"""Models with a classification head: pretrained, already fine-tuned, or cut from another one's layers."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlora.data.tags import tag_names
from kdlora.data.tasks import DEFAULT_METRICS, GENERIC_LABEL, PROBLEM_TYPES, Task, match_labels
from kdlora.errors import ModelError
from kdlora.models.loading import (
    Source,
    classifies_words,
    is_decoder,
    open_source,
    read_config,
    read_tokenizer,
    read_weights,
)

logger = logging.getLogger(__name__)

_PER_LAYER = ("layer_types", "mlp_layer_types", "attention_window", "no_rope_layers", "attention_layers")
"""Settings that hold one value per layer: ModernBERT's local and global attention, SmolLM3's positions, …"""

_OF_IMAGES = ["<image_soft_token>"]
"""What the tokenizer of Gemma 3 has beyond the last row of its models of texts alone."""


@dataclass
class Encoder:
    """A model that classifies texts, or their words, with its own tokenizer."""

    model: PreTrainedModel = field(repr=False)  # in fp32; its config carries label names and problem type
    tokenizer: PreTrainedTokenizerBase = field(repr=False)  # its `model_max_length` is what the model can really take
    fresh: tuple[str, ...]
    """Modules that the checkpoint did not train for this task: what it lacks, and the classification head. They are
    trained and saved in full beside any adapter."""
    source: str  # folder (absolute) or Hub id
    revision: str | None = None  # commit, tag or branch on the Hub

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def reads_words(self) -> bool:
        return type(self.model).__name__.endswith("ForTokenClassification")


def load_encoder(
    source: str, task: Task, *, seed: int, revision: str | None = None, trust_remote_code: bool = False
) -> Encoder:
    """Load a pretrained encoder and give it a new classification head for a task.

    A head that the checkpoint brings from another task starts anew, even where its shape would fit; what a
    *pretraining* checkpoint brings outside of the encoder (ModernBERT's prediction head) is kept, and trained.
    New weights depend on the seed alone, not on the global random state, which stays as it was.

    Args:
        source: a folder or a Hub id.
        task: gives number, names and kind of the labels.
        seed: of the new weights; every arm with this seed starts from the same model.
        revision: commit, tag or branch on the Hub.
        trust_remote_code: let the checkpoint's own Python code run.

    Returns:
        The encoder in fp32 and evaluation mode, with the dropout that its config asks for.

    Raises:
        ModelError: unreachable, damaged, pickled only, of another architecture, or without a tokenizer.

    Examples:
        >>> encoder = load_encoder("distilbert-base-uncased", splits.task, seed=0)
    """
    place = open_source(source, revision, trust_remote_code, task.kind == "tokens")
    config = read_config(place)
    if task.kind == "regression" and is_decoder(config):
        raise ModelError(
            f"{place.name} is a {config.model_type!r} model, a decoder: its head has no bias, so what it learns on "
            "standardised targets cannot be brought back to their scale. Choose an encoder for a regression"
        )
    config.id2label, config.label2id = task.id2label, task.label2id
    model, random = read_weights(place, config)
    _start_afresh(model, random, seed)
    return _encoder(place, model, random, task)


def load_fine_tuned(
    source: str,
    task: Task,
    *,
    label_names: Sequence[str] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Encoder, list[int]]:
    """Load a model that is already fine-tuned for a task, head included.

    Args:
        source: a folder or a Hub id.
        task: whose labels the model must have, in any order.
        label_names: names of the model's columns in their order, where its config only says LABEL_0, LABEL_1, …
        revision: commit, tag or branch on the Hub.
        trust_remote_code: let the checkpoint's own Python code run.

    Returns:
        The encoder, and the columns: column j of the task is column `columns[j]` of the model's logits.

    Raises:
        ModelError: as `load_encoder`; no trained head; or other labels than the task's.

    Examples:
        >>> encoder, columns = load_fine_tuned("distilbert-base-uncased-finetuned-sst-2-english", splits.task)
        >>> columns
        [0, 1]
    """
    place = open_source(source, revision, trust_remote_code, task.kind == "tokens")
    config = read_config(place)
    architectures = getattr(config, "architectures", None) or []
    what, end = ("token", "ForTokenClassification") if place.words else ("text", "ForSequenceClassification")
    if architectures and not any(name.endswith(end) for name in architectures):
        raise ModelError(
            f"{place.name} is a {', '.join(architectures)}, not a fine-tuned {what} classifier. Give it as "
            "teacher.model, and kdlora fine-tunes it"
        )
    columns = _match_columns(place, config, task, label_names)
    model, random = read_weights(place, config)
    if random:
        raise ModelError(
            f"{source} is not fine-tuned: it has no weights for {', '.join(sorted(random))}. Give it as "
            "teacher.model, and kdlora fine-tunes it; or give a model with a trained classification head"
        )
    return _encoder(place, model, random, task), columns


def student_from_layers(whole: Encoder, layers: Sequence[int]) -> Encoder:
    """Make a student from some layers of a pretrained encoder (arXiv 2305.15032), its embeddings and pooler."""
    stack, depth = find_layers(whole.model)
    if list(layers) != (fitting := sorted(set(layers) & set(range(depth)))):
        raise ModelError(
            f"student.from_teacher_layers is {list(layers)}, but {whole.source} has the layers 0 to {depth - 1}; "
            f"expected increasing indices without repetition, such as {fitting or [0]}"
        )
    # From a config, so that what is saved loads again as itself: ModernBERT's first layer lacks a norm of the others.
    config = copy.deepcopy(whole.model.config)
    for key in _PER_LAYER:
        values = getattr(config, key, None)
        if isinstance(values, list | tuple) and len(values) == depth:
            setattr(config, key, [values[layer] for layer in layers])
    config.num_hidden_layers = len(layers)
    if hasattr(config, "attention_layers"):  # of GPT-Neo, which saves them as pairs of kinds and a number of repeats
        config.attention_types = [[config.attention_layers, 1]]
    with torch.random.fork_rng(devices=[]):
        small = type(whole.model)._from_config(config, dtype=torch.float32)
    given, origin = whole.model.state_dict(), {}
    for key in small.state_dict():  # its layer number i is layer number `layers[i]` of the large one
        new, _, rest = key.removeprefix(stack + ".").partition(".")
        origin[key] = f"{stack}.{layers[int(new)]}.{rest}" if key.startswith(stack + ".") else key
    small.load_state_dict({key: given[old] for key, old in origin.items()})
    small.name_or_path = small.config._name_or_path = ""
    return replace(whole, model=small.eval())


def find_layers(model: PreTrainedModel) -> tuple[str, int]:
    """Find the stack of encoder layers: its name, and how many they are."""
    depth = model.config.num_hidden_layers
    found = [
        name
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    outer = [name for name in found if not any(name.startswith(other + ".") for other in found)]
    if len(outer) != 1:
        raise ModelError(
            f"cannot tell the layers of a {model.config.model_type!r} model apart: expected one list of {depth} "
            f"layers, found {', '.join(outer) or 'none'}. Choose a smaller sibling with student.model instead of "
            "student.from_teacher_layers"
        )
    return ("" if model.base_model is model else model.base_model_prefix + ".") + outer[0], depth


def save_encoder(encoder: Encoder, folder: Path) -> None:
    encoder.model.save_pretrained(folder)
    backend = getattr(encoder.tokenizer, "backend_tokenizer", None)
    if backend is not None:  # else the last call's padding and truncation are saved with it
        backend.no_padding()
        backend.no_truncation()
    encoder.tokenizer.save_pretrained(folder)


def fresh_modules(model: PreTrainedModel, random: Collection[str]) -> tuple[str, ...]:
    """Name what is trained in full: what the checkpoint lacks, and, by its outermost module, all beside the encoder."""
    head = [name for name, child in model.named_children() if child is not model.base_model]
    names = [name for name in head if any(True for _ in model.get_submodule(name).parameters())]
    absent = {key.rpartition(".")[0] for key in random}
    inner = {name for name in absent if name.partition(".")[0] not in head}
    return tuple(name for name, _ in model.named_modules() if name in inner or name in names)


@torch.no_grad()
def _start_afresh(model: PreTrainedModel, random: Set[str], seed: int) -> None:
    """Initialise what is missing, and another task's head, as the architecture does, from a seed of their own."""
    trained_as = getattr(model.config, "architectures", None) or [""]
    if not trained_as[0].endswith(("ForMaskedLM", "ForPreTraining")):
        prefix = model.base_model_prefix + "."
        random = random | {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        tensor._is_hf_initialized = name not in random  # transformers' guard, see its initialization.py
    for module in model.modules():
        module._is_hf_initialized = False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would touch the accelerator's state too
        model.initialize_weights()


def _encoder(place: Source, model: PreTrainedModel, random: Collection[str], task: Task) -> Encoder:
    fresh = fresh_modules(model, random)
    model.config.problem_type = None if place.words else PROBLEM_TYPES[task.kind]  # of words it is in the class alone
    tokenizer = read_tokenizer(place, model)
    try:
        rows = model.get_input_embeddings().num_embeddings
    except (NotImplementedError, AttributeError):
        raise ModelError(
            f"{place.name} is a {model.config.model_type!r} model, which has no plain table of a row for each piece, "
            "as those of characters or bytes. Choose another encoder"
        ) from None
    if tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer)))) not in ([], _OF_IMAGES):
        raise ModelError(
            f"the tokenizer of {place.name} has {len(tokenizer)} pieces, but its model has embeddings for {rows}: "
            "they do not belong together. Copy the model's own tokenizer beside the weights"
        )
    _fit_tokenizer(tokenizer, model)
    if is_decoder(model.config):
        _check_pooling(model, place)
    logger.info("%s: trained in full beside any adapter: %s", place.name, ", ".join(fresh))
    return Encoder(model, tokenizer, fresh, place.name, place.revision)


def _fit_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Make the tokenizer give no longer texts than the model has positions, and the model pad as the tokenizer does."""
    config, decodes = model.config, is_decoder(model.config)
    if config.pad_token_id is None or decodes:  # by it a decoder finds the last token that is none
        config.pad_token_id = tokenizer.pad_token_id
    if decodes:
        config.use_cache = False  # what only the next token would need
    positions = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    for name, module in model.base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa counts from there
            positions = min(positions, module.num_embeddings - offset)  # LUKE's entities, LayoutLM's boxes have others
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)


@torch.inference_mode()
def _check_pooling(model: PreTrainedModel, place: Source) -> None:
    """Refuse a decoder whose answer depends on the padding: it reads a place, not the last token of the text."""
    pad = model.config.pad_token_id
    ids = torch.tensor([[token for token in range(4) if token != pad][:3]])
    padded = nn.functional.pad(ids, (0, 4), value=pad)
    alone, filled = (
        model(one, attention_mask=(torch.arange(one.shape[1])[None] < 3).long()).logits for one in (ids, padded)
    )
    if not torch.allclose(alone, filled, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ModelError(
            f"{place.name} is a {model.config.model_type!r} model, whose answer to a text depends on the padding "
            "beside it: transformers does not pool its last token. Choose another decoder, or an encoder"
        )


def _label_names(place: Source, config: PretrainedConfig, given: Sequence[str] | None) -> list[str]:
    """Name a model's outputs, as the user does or else its config."""
    if sorted(config.id2label) != list(range(config.num_labels)):
        raise ModelError(
            f"{place.name}: id2label in its config.json names the outputs {list(config.id2label)!s:.80}; number them "
            f"0 to {config.num_labels - 1}"
        )
    found = [str(config.id2label[column]) for column in range(config.num_labels)]
    if given is not None and len(given) != len(found):
        raise ModelError(
            f"teacher.label_names, or --label-name, has {len(given)} names ({', '.join(given)}), but {place.name} has "
            f"{len(found)} outputs ({', '.join(found)})"
        )
    if given is not None and {*given} == {*found} and list(given) != found:
        raise ModelError(
            f"teacher.label_names, or --label-name, has the names of {place.name} in another order than its "
            f"config.json ({', '.join(found)}), so answers would get names of others; leave it out, or correct id2label"
        )
    return list(found if given is None else given)


def _match_columns(place: Source, config: PretrainedConfig, task: Task, label_names: Sequence[str] | None) -> list[int]:
    if task.kind == "regression":
        found = _label_names(place, config, None)
        if len(found) != 1:
            raise ModelError(
                f"{place.name} has {len(found)} outputs ({', '.join(found)}); a regression needs a teacher with one"
            )
        return [0]
    if config.num_labels == 1 < task.num_labels:
        raise ModelError(
            f"{place.name} has one output, a score, and the task has {task.num_labels} labels. It can still teach two: "
            "by a table for teacher.logits, with 0 for one label and its raw score for the other"
        )
    names = _label_names(place, config, label_names)
    where = place.name if label_names is None else "teacher.label_names"
    remedy = (
        "Set teacher.label_names to the task's names in the order of the model's outputs, which its card gives, if "
        "only the names differ. Where the data lack a label that it has, name all of its labels in task.label_names: "
        "a teacher must have the labels of the task, all of them and no others"
    )
    columns = match_labels(names, task.label_names, where, remedy, ModelError)
    if label_names is not None:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: column for column, name in enumerate(names)}
    return columns


def read_task(
    source: str,
    *,
    label_names: Sequence[str] | None = None,
    text: Sequence[str] = ("text",),
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Task:
    """Read kind and labels of a fine-tuned classifier from its config, without loading its weights."""
    place = open_source(source, revision, trust_remote_code)
    config = read_config(place)
    noted = getattr(config, "kdlora_task", None)
    if noted is not None and label_names is None:
        return Task.from_dict(noted)
    names = tuple(_label_names(place, config, label_names))
    if classifies_words(place, config):
        types = sorted({name[2:] for name in names if name.startswith(("B-", "I-"))})
        remedy = "Label with a model whose tags are in IOB2: `O`, and `B-TYPE` and `I-TYPE` of each type"
        match_labels(names, tag_names(types), source, remedy, ModelError)
        return Task("tokens", tuple(text), ("tags",), tag_names(types), DEFAULT_METRICS["tokens"])
    problem = config.problem_type or ("regression" if len(names) == 1 else "single_label_classification")
    kind = next((kind for kind, name in PROBLEM_TYPES.items() if name == problem), None)
    if kind is None:
        raise ModelError(
            f"{source} has the problem_type {problem!r:.80}; expected one of {', '.join(PROBLEM_TYPES.values())}"
        )
    if kind != "regression" and any(GENERIC_LABEL.fullmatch(name) for name in names):
        raise ModelError(
            f"{source} calls its labels {', '.join(names)}, which are no real names; give them in the order of its "
            "outputs with --label-name, once for each"
        )
    if len(set(names)) < len(names):
        raise ModelError(f"{source} has two labels of one name ({', '.join(names):.200}); name them with --label-name")
    return Task(kind, tuple(text), ("label",), names, DEFAULT_METRICS[kind])
