"""Run an adapter unmerged, on its base: for the benchmark that shows what merging saves, and for nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForSequenceClassification

from kdlora.deploy.folder import ModelFolder, read_json
from kdlora.deploy.predict import Classifier
from kdlora.deploy.torch_backend import TorchBackend, load_tokenizer
from kdlora.errors import ModelError, first_line
from kdlora.models.checkpoints import quiet_loading


def load_unmerged(folder: str | Path, *, threads: int | None = None) -> Classifier:
    """Load an adapter on its base, without merging.

    Args:
        folder: of an adapter that carries its head, as kdlora saves it.
        threads: PyTorch's threads, a setting of the whole process.

    Returns:
        A classifier; its labels are those of the base's config, where their number fits.

    Raises:
        ModelError: the base is not there, or the adapter carries no head.
    """
    path = Path(folder)
    address = read_json(path / "adapter_config.json").get("base_model_name_or_path")
    labels = _count_labels(path / "adapter_model.safetensors")
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(address, local_files_only=True)
            if config.num_labels != labels:  # setting it names the labels anew
                config.num_labels = labels
            base = AutoModelForSequenceClassification.from_pretrained(address, config=config, dtype=torch.float32)
            PeftModel.from_pretrained(base, str(path))
    except Exception as error:
        raise ModelError(f"{path}: the adapter's base {address!r} cannot be loaded: {first_line(error)}") from error
    described = ModelFolder(
        path=Path(str(address)),
        backend="transformers",
        file=None,
        kind="regression" if labels == 1 else "single-label",
        label_names=tuple(config.id2label[column] for column in range(labels)),
        model_type=config.model_type,
        max_length=128,
        position_limit=None,
        temperature=1.0,
        task=None,
        record=None,
    )
    if threads is not None:
        torch.set_num_threads(threads)
    # PEFT puts its layers into the base itself: running the base runs the adapter, and shows the base's inputs.
    backend = TorchBackend(base.eval(), load_tokenizer(described))
    return Classifier(described, backend, backend.tokenizer_json)


def _count_labels(weights: Path) -> int:
    """Read the number of labels from the head that the adapter carries.

    Raises:
        ModelError: no weights, or no head among them.
    """
    if not weights.is_file():
        raise ModelError(f"{weights}: no such file; an adapter folder holds adapter_model.safetensors.")
    with safe_open(weights, framework="pt") as tensors:
        heads = [name for name in tensors.keys() if name.endswith(".weight") and "lora_" not in name]  # noqa: SIM118
        outputs = [name for name in heads if "classifier" in name or "out_proj" in name or "score" in name]
        if not outputs:
            raise ModelError(f"{weights}: the adapter carries no classification head.")
        return min(tensors.get_slice(name).get_shape()[0] for name in outputs)
