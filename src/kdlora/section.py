"""What the sections of all our files have in common: unknown keys are refused, and `yes` where a number belongs."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


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
