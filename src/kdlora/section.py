"""What the sections of all our files have in common, keys with a form of their own; the rows and what ships."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator

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


Label = Annotated[str, BeforeValidator(str)]
"""A label that may be written as a number."""
Costs = dict[Label, dict[Label, Annotated[float, Field(ge=0.0, strict=True)]]]
Weights = dict[Label, Annotated[float, Field(gt=0.0, strict=True)]]
_FULL = Field(min_length=1)
Metric = Annotated[str, _FULL] | Annotated[dict[Literal["cost"], Annotated[Costs, _FULL]], _FULL]
ClassWeights = Literal["balanced"] | Annotated[Weights, _FULL]
OpenClassWeights = Literal["auto"] | ClassWeights


class Section(BaseModel):
    """A section of a file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, values: Any) -> Any:
        """Take a section whose keys are all commented out for one without keys."""
        if not isinstance(values, Mapping):
            return values
        sections = {name for name, field in cls.model_fields.items() if isinstance(field.default, Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_by_yes(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` where a number is expected, which would count as 1."""
        found = [item for item in (value if isinstance(value, list | tuple) else [value]) if isinstance(item, bool)]
        if found and not re.search("bool|Any", str(cls.model_fields[str(info.field_name)].annotation)):
            told = "a name such as yes, no, on or off needs quotes in YAML"
            raise ValueError(f"expected another kind of value than {str(found[0]).lower()}; {told}")
        return value


SEEDS, MOST = 2**32, 2**31 - 1
"""NumPy's seeds; what tokenizers, Arrow and PyTorch can all count to."""


WINDOW_KEYS = ("long_texts", "window_pool", "window_stride")
"""Keys of `data` that say how long texts are read, and not which rows there are."""


class DataConfig(Section):
    """Where the rows come from. Relative paths start at the config file's folder."""

    path: str | None = None
    """A folder in GLUE's layout, a `save_to_disk` folder, or a Hub data set such as `nyu-mll/glue`."""
    subset: str | None = None
    """Configuration of the Hub data set, if it has several."""
    revision: str | None = None
    """Commit, tag or branch of the Hub data set."""
    train: str | None = None
    """Training file (CSV, TSV, JSON Lines, Parquet, CoNLL); with `path`, the name of the training split."""
    validation: str | None = None
    """Validation file or split name. Default: a part of the training rows."""
    test: str | None = None
    """Test file or split name. If there is one, reported scores are measured on it."""
    unlabelled: str | None = None
    """More texts without labels: a file, a folder written by `kdlora label`, or a split name. In a `.txt` file every
    line is a text. The teacher labels them, and the distilled arms learn from them too.
    """
    id_column: str = "id"
    """Column with the ids of the rows. Without it, the id is the row number from 0."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training rows that is used for validation if no validation split is given. With many classes it is
    up to a fifth, so that each may give a row. Of equal texts all rows or none are drawn."""
    split_seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of that split, and of the copies of the training texts (`augment`). It does not depend on `run.seeds`."""
    max_train_examples: int | None = Field(default=None, ge=1, le=MOST)
    """Use only this many training rows, the first ones."""
    max_unlabelled_examples: int | None = Field(default=None, ge=1, le=MOST)
    """Use only this many rows of `unlabelled`, the first ones."""
    long_texts: Literal["cut", "windows"] = "cut"
    """How a model reads a text longer than its `max_length`: the beginning alone, or all of it in overlapping windows,
    whose logits are pooled. `windows` is for single texts with labels; a task of tokens has windows of its own."""
    window_pool: Literal["mean", "max"] = "mean"
    """How the logits of a text's windows become one row: their mean, or each label's largest."""
    window_stride: int | None = Field(default=None, ge=0, le=MOST)
    """Tokens that a window shares with the one before, as transformers' `stride`. null: a quarter of the window."""
    augment: int | None = Field(default=0, ge=0, le=1000)
    """Perturbed copies of each training text (TinyBERT, arXiv 1909.10351). The teacher labels them. Each step of a
    distilled arm has one copy beside every row. null: 15 of few texts, 4 of many, between them 24,000 in all, of very
    many fewer; none where `unlabelled` has as many texts as these would be, or is a labelled collection. A text of a
    rare class has more copies, one of a frequent class fewer, where classes count alike (macro F1, balanced accuracy),
    and in multi-label tasks. A pass draws one copy of each text: if you set fewer `student.train.epochs` than copies,
    set as many here, and the teacher has less to label."""

    @property
    def row_settings(self) -> tuple[Any, ...]:
        """What decides which rows are read, and not how a model reads them."""
        return tuple(self.model_dump(exclude=set(WINDOW_KEYS)).values())

    @property
    def without_copies(self) -> Self:
        return self.model_copy(update={"augment": 0})

    @model_validator(mode="after")
    def _has_a_source(self) -> Self:
        if self.path is None and self.train is None:
            raise ValueError("no data: set data.path (folder or Hub id) or data.train (file)")
        if self.path is None and (self.subset or self.revision):
            raise ValueError("data.subset and data.revision describe a Hub data set; set data.path to its id")
        if self.unlabelled is None and self.max_unlabelled_examples is not None:
            raise ValueError("data.max_unlabelled_examples limits data.unlabelled, which is not set")
        if self.long_texts == "cut" and (self.window_pool, self.window_stride) != ("mean", None):
            raise ValueError("data.window_pool and data.window_stride are of windows; set data.long_texts to windows")
        return self


Share = Annotated[float, Field(gt=0.0, le=1.0)]
Goal = Literal["f1", "macro_f1", "accuracy", "balanced_accuracy", "matthews"] | Annotated[float, Field(gt=0.0, lt=1.0)]


class ExportConfig(Section):
    """The export of the shipped student."""

    formats: tuple[Literal["onnx", "onnx-int8", "openvino"], ...] = ("onnx", "onnx-int8")
    """Files in `student-onnx/`: fp32, dynamic int8, and static int8 for OpenVINO. An empty list exports nothing."""
    max_metric_drop: float = Field(default=0.5, ge=0.0)
    """Points of the score that int8 may lose beside one row, unless this is 0; for values these or a row's share, for
    tokens these or an entity's. If it loses more, it is not kept."""
    min_agreement: float = Field(default=0.97, ge=0.0, le=1.0)
    """Share of predictions that must be the same in int8 and fp32. One of 20 or more may differ, unless this is 1."""
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
