"""Run a transformers folder with PyTorch in fp32; the reference that every export is compared with."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch

from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.network import INPUTS
from kdlora.errors import ModelError
from kdlora.models import loading
from kdlora.models.loading import Source


class TorchBackend:
    """A whole classifier in fp32 on the CPU, in evaluation mode."""

    def __init__(self, folder: ModelFolder, *, threads: int | None = None) -> None:
        """Load it; a checkpoint that lacks the head is refused, not filled at random."""
        if threads is not None:
            torch.set_num_threads(threads)
        source = Source(str(folder.path), local=True)
        self.model, random = loading.load_weights(source, loading.load_config(source))
        if absent := sorted(random):
            raise ModelError(
                f"{folder.path}: the checkpoint lacks weights of the classifier ({', '.join(absent[:3])}"
                f"{', …' if len(absent) > 3 else ''}). Fine-tune it first: their values would be random."
            )
        self.tokenizer = loading.load_tokenizer(source, self.model)
        if not self.tokenizer.is_fast:
            name = type(self.tokenizer).__name__
            raise ModelError(f"{folder.path}: expected a tokenizer of the `tokenizers` library, got {name}.")
        # As transformers builds it, which may differ from the folder's own file.
        self.tokenizer_json: str = self.tokenizer.backend_tokenizer.to_str()
        taken = inspect.signature(self.model.forward).parameters
        self.input_names = tuple(name for name in INPUTS if name in self.tokenizer.model_input_names and name in taken)

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        with torch.inference_mode():
            output = self.model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
        return None if output.logits is None else output.logits.float().numpy()
