"""The section of a configuration on its rows: where they come from, and how long texts are read."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from kdlora.section import Section

SEEDS, MOST = 2**32, 2**31 - 1
"""NumPy's seeds; what tokenizers, Arrow and PyTorch can all count to."""


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
    """Share of the training rows that is used for validation if no validation split is given."""
    split_seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of that split. It does not depend on `run.seeds`."""
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
    augment: int = Field(default=0, ge=0, le=1000)
    """Perturbed copies of each training text (TinyBERT, arXiv 1909.10351). The teacher labels them. Each step of a
    distilled arm has one copy beside every labelled row."""

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
