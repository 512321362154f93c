"""Run a transformers folder with PyTorch in fp32; the reference that every export is compared with."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from kdlora.deploy.folder import ModelFolder
from kdlora.errors import ModelError, first_line
from kdlora.models.checkpoints import quiet_loading

_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class TorchBackend:
    """A transformers model on the CPU, in evaluation mode."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take a loaded model.

        Args:
            model: in evaluation mode.
            tokenizer: its own.
        """
        self.model = model
        self.tokenizer = tokenizer
        taken = inspect.signature(model.forward).parameters
        self.input_names = tuple(name for name in _INPUTS if name in tokenizer.model_input_names and name in taken)

    @classmethod
    def load(cls, folder: ModelFolder, *, threads: int | None = None) -> TorchBackend:
        """Load a transformers folder.

        Args:
            folder: its description.
            threads: PyTorch's threads, a setting of the whole process; unchanged by default.

        Raises:
            ModelError: weights that do not fit config.json, or a head that is missing from the checkpoint.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        return cls(load_model(folder), load_tokenizer(folder))

    @property
    def tokenizer_json(self) -> str:
        """Content of a `tokenizer.json` that tokenises as transformers does."""
        content: str = self.tokenizer.backend_tokenizer.to_str()
        return content

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens)."""
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        logits: np.ndarray = output.logits.float().numpy()
        return logits


def load_model(folder: ModelFolder) -> PreTrainedModel:
    """Load a whole classifier in fp32; a checkpoint that lacks the head is refused, not filled at random.

    Raises:
        ModelError: missing or mismatched weights, or files that transformers cannot read.
    """
    try:
        with quiet_loading():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder.path, output_loading_info=True, dtype=torch.float32, local_files_only=True
            )
    except Exception as error:
        raise ModelError(f"{folder.path}: transformers cannot load the model: {first_line(error)}") from error
    absent = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if absent:
        raise ModelError(
            f"{folder.path}: the checkpoint lacks weights of the classifier ({', '.join(absent[:3])}"
            f"{', …' if len(absent) > 3 else ''}). Fine-tune it first: their values would be random."
        )
    return model.eval()


def load_tokenizer(folder: ModelFolder) -> PreTrainedTokenizerBase:
    """Load the tokenizer as transformers builds it, which may differ from the folder's `tokenizer.json`.

    Raises:
        ModelError: there is none, or it is not one of the fast ones.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder.path, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder.path}: transformers cannot load the tokenizer: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder.path}: expected a tokenizer of the `tokenizers` library, got {type(tokenizer).__name__}."
        )
    return tokenizer
