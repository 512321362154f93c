"""The stages of an export for OpenVINO: the fp32 file, in bf16 too, and static int8 by NNCF.

Static int8 has the scales of activations from texts of the task, and moves their outliers into the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdlora.deploy.folder import ONNX_FP32, OPENVINO_INT8
from kdlora.deploy.gates import Checks, Gate, measure_agreement
from kdlora.deploy.graph import quiet
from kdlora.deploy.openvino_backend import has_bf16, import_untracked, openvino
from kdlora.deploy.quantise import join_rows
from kdlora.system.ownership import remove

nncf = import_untracked("nncf")
Inputs = dict[str, np.ndarray]
_PLAIN, CAREFUL = "static int8 with smoothed activations", "static int8, sensitive operators in fp32"
RECIPES = (_PLAIN, CAREFUL)
"""In the order in which they are tried; the second looks for the operators whose rounding changes decisions."""


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
    for recipe in RECIPES:
        say(f"OpenVINO: {recipe}")
        _quantise(source, to, recipe, checks, 1.0 if int8.agreement is None else int8.agreement)
        parity = checks.judge(f"openvino-int8 ({recipe})", to, int8, runtime="openvino")
        if parity.passed:
            return ""
    for file in (to, to.with_suffix(".bin")):
        remove(file)
    return f"int8 for OpenVINO does not hold: {parity.reason}"


def _quantise(source: Path, to: Path, recipe: str, checks: Checks, least: float) -> None:
    """Write an int8 file; the second recipe keeps operators in fp32 until so many decisions are those of fp32."""
    batches = [batch for text in checks.calibration for batch in checks.model.batches([text])]
    rows: list[Inputs] = [arrays for _, arrays in batches]
    exact = join_rows(checks.model.run(arrays) for arrays in rows)

    def validate(compiled: Any, items: Iterable[Inputs]) -> float:
        found = join_rows(compiled(item)[0] for item in items)
        if checks.task.kind == "tokens":
            return float((found.argmax(axis=1) == exact.argmax(axis=1)).mean())
        return measure_agreement(checks.task, exact, found)

    model, data = openvino.Core().read_model(source), nncf.Dataset(rows)
    settings: dict[str, Any] = {"model_type": nncf.ModelType.TRANSFORMER, "subset_size": len(rows)}
    with quiet("nncf"):
        if recipe == _PLAIN:
            found = nncf.quantize(model, data, **settings)
        else:
            settings["max_drop"] = 1 - least
            found = nncf.quantize_with_accuracy_control(model, data, data, validation_fn=validate, **settings)
    openvino.save_model(found, to, compress_to_fp16=False)
