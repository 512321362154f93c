"""Run an exported file by OpenVINO on the CPU; like ONNX Runtime it gets bytes that were read and checked before."""

from __future__ import annotations

import importlib
import sys
import threading
from functools import cache
from typing import Any

import numpy as np

from kdlora.deploy.folder import ModelFolder
from kdlora.deploy.onnx_backend import read_export
from kdlora.errors import ArtifactError, ModelError, first_line
from kdlora.system.environment import default_threads


def import_untracked(name: str) -> Any:
    """Import a package of OpenVINO without the one that tells its makers of imports and calls."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module(name)


openvino = import_untracked("openvino")
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}
"""The format of what is not int8; else OpenVINO would choose it by the processor, and scores with it."""


class OpenvinoBackend:
    """OpenVINO on the CPU."""

    def __init__(self, folder: ModelFolder, *, threads: int | None, verify: bool) -> None:
        """Compile a file, after comparing what decides an answer with the hashes that the export recorded."""
        if folder.precision == "bf16" and not has_bf16():
            raise ModelError("precision bf16 needs a processor with products in bf16; take fp32 or int8 here.")
        self.tokenizer_json, graph, weights = read_export(folder, verify=verify)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads or default_threads(),
            "INFERENCE_PRECISION_HINT": _HINTS[folder.precision],
        }
        try:
            core = openvino.Core()
            self._compiled = core.compile_model(core.read_model(graph, weights), "CPU", settings)
        except Exception as error:
            raise ArtifactError(
                f"{folder.file}: OpenVINO {openvino.__version__} cannot load it ({first_line(error):.200}). "
                "Use ONNX Runtime (runtime='onnxruntime'), or export the model again."
            ) from None
        self.input_names = tuple(port.any_name for port in self._compiled.inputs)
        self._of_thread = threading.local()  # a request holds its inputs and outputs

    def run(self, inputs: dict[str, np.ndarray]) -> Any:
        if not hasattr(self._of_thread, "request"):
            self._of_thread.request = self._compiled.create_infer_request()
        return self._of_thread.request.infer(inputs)[0]


@cache
def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
