"""The stages of an export for OpenVINO: the fp32 file, in bf16 too, and static int8 by NNCF.

Static int8 has the scales of activations from texts of the task, and moves their outliers into the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from kdlora.deploy.folder import ONNX_FP32, OPENVINO_INT8
from kdlora.deploy.gates import Checks, Gate
from kdlora.deploy.graph import quiet
from kdlora.deploy.openvino_backend import has_bf16, import_untracked, openvino
from kdlora.system.ownership import remove

nncf = import_untracked("nncf")
_RECIPE = "static int8 with smoothed activations"


def add_openvino(work: Path, checks: Checks, exact: Gate, int8: Gate, say: Callable[[str], None]) -> str:
    """Judge `model.onnx` in OpenVINO, and make an int8 file of it; say what does not hold, nothing where all does."""
    source, to = work / ONNX_FP32, work / OPENVINO_INT8
    say("OpenVINO: fp32")
    parity = checks.judge("openvino", source, exact, runtime="openvino")
    if not parity.passed:
        return f"OpenVINO does not reproduce the optimised graph: {parity.reason}"
    if has_bf16():
        say("OpenVINO: bf16")
        checks.judge("openvino-bf16", source, int8, runtime="openvino", half=True)
    say(f"OpenVINO: {_RECIPE}")
    _quantise(source, to, checks)
    parity = checks.judge(f"openvino-int8 ({_RECIPE})", to, int8, runtime="openvino")
    if parity.passed:
        return ""
    for file in (to, to.with_suffix(".bin")):
        remove(file)
    return f"int8 for OpenVINO does not hold: {parity.reason}"


def _quantise(source: Path, to: Path, checks: Checks) -> None:
    rows = [arrays for text in checks.calibration for _, arrays in checks.model.batches([text])]
    model, kind = openvino.Core().read_model(source), nncf.ModelType.TRANSFORMER
    with quiet("nncf"):
        found = nncf.quantize(model, nncf.Dataset(rows), model_type=kind, subset_size=len(rows))
    openvino.save_model(found, to, compress_to_fp16=False)
