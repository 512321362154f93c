"""The sections of a configuration on what ships: its export, and the error rate that it promises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from kdlora.section import Section

Share = Annotated[float, Field(gt=0.0, le=1.0)]
Goal = Literal["f1", "macro_f1", "accuracy", "balanced_accuracy", "matthews"] | Annotated[float, Field(gt=0.0, lt=1.0)]


class ExportConfig(Section):
    """The export of the shipped student."""

    formats: tuple[Literal["onnx", "onnx-int8", "openvino"], ...] = ("onnx", "onnx-int8")
    """Files in `student-onnx/`: fp32, dynamic int8, and static int8 for OpenVINO. An empty list exports nothing."""
    max_metric_drop: float = Field(default=0.5, ge=0.0)
    """Points of the score that int8 may lose. If it loses more, it is not kept."""
    min_agreement: float = Field(default=0.99, ge=0.0, le=1.0)
    """Share of predictions that must be the same in int8 and fp32."""
    min_recall: dict[str, Share] = Field(default_factory=dict)
    """Least share of the entities of a type that every file must find on the validation rows, such as {EMAIL: 0.99}.
    Nothing is exported below it. For `task.kind: tokens`."""
    calibrate: bool = False
    """Fit a temperature to the validation rows. `Classifier` and `Tagger` then divide the logits by it."""
    benchmark: bool = True
    """Measure teacher, student and exports side by side, for `benchmark.json` and the report."""
    thresholds: Goal | dict[str, Goal] | None = None
    """Fit the probability above which a label is predicted: for `f1`, `macro_f1`, `accuracy`, `balanced_accuracy`,
    `matthews` or a precision (0.9), or for some labels only (`{label: 0.9}`). For multi-label tasks and two labels."""


class DeferConfig(Section):
    """The error rate that the shipped student promises on the test split. Less certain texts get no label."""

    error: float | None = Field(default=None, gt=0.0, lt=1.0)
    """Largest share of wrong answers. null promises nothing."""
    confidence: float = Field(default=0.95, gt=0.0, lt=1.0)
    """Confidence of that promise."""
    sureness: Literal["probability", "margin", "energy"] = "probability"
    """Number that is compared with the threshold."""
