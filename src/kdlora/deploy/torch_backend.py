"""Run a transformers folder with PyTorch in fp32; the reference that every export is compared with."""

from __future__ import annotations

import inspect

import numpy as np
import torch
from transformers import PreTrainedModel

from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.predict import INPUTS
from kdlora.errors import ModelError, first_line
from kdlora.models import loading
from kdlora.models.loading import Source


class TorchBackend:
    """A transformers model on the CPU, in evaluation mode."""

    def __init__(self, folder: ModelFolder, *, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_model(folder)
        self.tokenizer = loading.load_tokenizer(Source(str(folder.path), local=True))
        if not self.tokenizer.is_fast:
            name = type(self.tokenizer).__name__
            raise ModelError(f"{folder.path}: expected a tokenizer of the `tokenizers` library, got {name}.")
        # As transformers builds it, which may differ from the folder's own file.
        self.tokenizer_json: str = self.tokenizer.backend_tokenizer.to_str()
        taken = inspect.signature(self.model.forward).parameters
        self.input_names = tuple(name for name in INPUTS if name in self.tokenizer.model_input_names and name in taken)

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Compute float32 logits (rows, labels) of int64 arrays (rows, tokens)."""
        try:
            with torch.inference_mode():
                output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        except Exception as error:  # a config decides what is computed, and it may be anybody's
            if "memory" in str(error):
                raise MemoryError(first_line(error)) from error
            raise ModelError(f"{self.model.name_or_path}: the model cannot run ({first_line(error)}).") from error
        if not isinstance(getattr(output, "logits", None), torch.Tensor):
            raise ModelError(f"{self.model.name_or_path}: the model gives no logits.")
        logits: np.ndarray = output.logits.float().numpy()
        return logits


def load_model(folder: ModelFolder) -> PreTrainedModel:
    """Load a whole classifier in fp32; a checkpoint that lacks the head is refused, not filled at random."""
    source = Source(str(folder.path), local=True)
    loaded = loading.load_weights(source, loading.load_config(source))
    absent = sorted(loaded.missing | loaded.mismatched)
    if absent:
        raise ModelError(
            f"{folder.path}: the checkpoint lacks weights of the classifier ({', '.join(absent[:3])}"
            f"{', …' if len(absent) > 3 else ''}). Fine-tune it first: their values would be random."
        )
    return loaded.model
