"""Which extra brings which package, and the one sentence that says so where a package is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

from kdlora.errors import KdLoraError

EXTRAS = {
    "train": (
        *("torch", "transformers", "peft", "datasets", "accelerate", "safetensors", "sentencepiece", "onnx", "onnx_ir"),
        *("onnxscript", "sklearn", "scipy", "pandas", "pyarrow", "matplotlib", "jinja2", "markupsafe"),
        "psutil",
    ),
    "parquet": ("pyarrow",),
    "serve": ("fastapi", "httptools", "prometheus_client", "uvicorn"),
    "openvino": ("openvino",),
    "openvino-export": ("nncf",),
    "ask": ("openai",),
    "ray": ("ray",),
    "search": ("optuna",),
    "trackers": ("mlflow", "tensorboard", "wandb"),
}
"""Modules that the light installation lacks; one that two extras bring is most often missed for the first."""


class MissingExtraError(KdLoraError, ImportError):
    """A package that is part of an extra is not installed; the message says which extra brings it.

    Examples:
        >>> issubclass(MissingExtraError, ImportError)
        True
    """


def check_installed(what: str, extra: str) -> None:
    """Refuse what needs an extra of which a package is not installed."""
    for module in EXTRAS[extra]:
        if importlib.util.find_spec(module) is None:
            raise _missing(what, module, extra)


@contextmanager
def extras_named(what: str) -> Iterator[None]:
    """Turn a failed import of a package that an extra brings into the sentence that names the extra."""
    try:
        yield
    except ModuleNotFoundError as error:
        module = (error.name or "").partition(".")[0]
        extra = next((name for name, modules in EXTRAS.items() if module in modules), None)
        if extra is None:
            raise
        raise _missing(what, module, extra) from None


def _missing(what: str, module: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{what} needs {module}, not installed here: pip install 'kdlora[{extra}]'")
