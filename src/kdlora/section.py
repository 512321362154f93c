"""What the sections of all our files have in common, and the keys that have a form of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

_LATER: Mapping[str, tuple[Any, ...]] = {
    "metric": (None, "accuracy"),
    "class_weights": (None,),
    "tuning": ("full",),
    "thresholds": (None,),
    "devices": ("auto", "one"),
    "long_texts": ("cut",),
    "window_pool": ("mean",),
    "window_stride": (None,),
    "min_recall": ({},),
    "defer": ({"error": None, "confidence": 0.95, "sureness": "probability"},),
}
"""Keys that version 0.2 did not have, and the values by which all is as it was there."""


def without_later_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what an earlier version did not know and did all the same, so that its hashes are those of today."""
    return {
        key: without_later_keys(value) if isinstance(value, Mapping) else value
        for key, value in values.items()
        if value not in _LATER.get(key, ())
    }


def _figures(values: Mapping[Any, Any], what: str, *, least: float | None = None) -> dict[str, float]:
    """Check figures by label: finite, and above 0 or not below the least."""
    for name, value in values.items():
        known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not known or not (value > 0 if least is None else value >= least):
            expected = "above 0" if least is None else f"of {least:g} or more"
            raise ValueError(f"the {what} {str(name)!r} is {value!r}; expected a number {expected}")
    return {str(name): float(value) for name, value in values.items()}


def _metric(value: Any) -> Any:
    """Check the form of a metric; whether it fits the task is known with the data."""
    if isinstance(value, str) or value is None:
        return value
    costs = value.get("cost") if isinstance(value, Mapping) and set(value) == {"cost"} else None
    if not isinstance(costs, Mapping) or not costs or not all(isinstance(row, Mapping) for row in costs.values()):
        raise ValueError(f"expected the name of a metric, or cost: {{label: {{decision: cost}}}}, got {value!r}")
    return {"cost": {str(label): _figures(row, f"cost of {label!r} as", least=0.0) for label, row in costs.items()}}


def _weights(value: Any) -> Any:
    """Check the form of class weights."""
    if value == "balanced" or value is None:
        return value
    if not isinstance(value, Mapping) or not value:
        raise ValueError(f"expected balanced, or weights by label such as {{spam: 5}}, got {value!r}")
    return _figures(value, "weight of")


Costs = dict[str, dict[str, float]]
Metric = Annotated[str | dict[Literal["cost"], Costs], BeforeValidator(_metric)]
ClassWeights = Annotated[Literal["balanced"] | dict[str, float], BeforeValidator(_weights)]


class Section(BaseModel):
    """A section of a file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_by_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` where a number is expected, which would count as 1."""
        found = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, bool)]
        if found and not re.search("bool|Any", str(cls.model_fields[str(info.field_name)].annotation)):
            raise ValueError(f"expected another kind of value than {str(found[0]).lower()}")
        return value
