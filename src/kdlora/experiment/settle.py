"""What a config leaves open is settled by its data and models, once for an experiment: lengths, steps and rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from datasets import Dataset
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from kdlora.config import Config, SettledTraining, TrainConfig
from kdlora.configfile import load_config
from kdlora.data.batches import PAD_MULTIPLE, encode_texts
from kdlora.data.load import Splits
from kdlora.data.spool import read_column
from kdlora.defaults import adapter_rate, epochs_for, full_rate
from kdlora.errors import ConfigError
from kdlora.experiment.inputs import loaded_models
from kdlora.models.encoders import Encoder

Texts = Mapping[str, list[str]]
"""`text`, and `text_pair` for pairs."""

OPEN = ("max_length", "epochs", "learning_rate")
"""Keys of a training that may be null until data and models are known."""

HELD = 0.99
"""Share of the training texts that the chosen length holds whole."""
LEAST = 16
MOST_TEXTS = 5_000
"""So many texts are looked at, spread evenly over the training rows."""


def sample_texts(rows: Dataset) -> dict[str, list[str]]:
    """Take texts that stand for all of a split.

    Args:
        rows: canonical columns.
    """
    if len(rows) > MOST_TEXTS:
        rows = rows.select(np.linspace(0, len(rows) - 1, MOST_TEXTS).astype(int))
    return all_texts(rows)


def all_texts(rows: Dataset) -> dict[str, list[str]]:
    """Give the texts of a split.

    Args:
        rows: canonical columns.
    """
    return {name: read_column(rows, name).to_pylist() for name in ("text", "text_pair") if name in rows.column_names}


def count_tokens(texts: Texts, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Count the tokens of each text or pair, uncut, special tokens included.

    Args:
        texts: from `sample_texts`.
        tokenizer: a model's own.

    Returns:
        int64 `(texts,)`.
    """
    return np.asarray(encode_texts(texts, tokenizer, 2**31 - 1)["length"])


def choose_max_length(lengths: Iterable[np.ndarray], limits: Iterable[int]) -> int:
    """Choose what holds 99% of the texts for every tokenizer, a multiple of 8, at least 16, within every limit.

    Args:
        lengths: tokens of each text, by each tokenizer.
        limits: most tokens that each model takes.
    """
    held = max(float(np.quantile(counts, HELD, method="inverted_cdf")) for counts in lengths)
    return min([max(LEAST, math.ceil(held / PAD_MULTIPLE) * PAD_MULTIPLE), *limits])


Role = Literal["teacher", "student"]
Section = TypeVar("Section", bound=BaseModel)


@dataclass(frozen=True)
class Chosen:
    """What data and models decide where a config decides nothing.

    Attributes:
        max_length: tokens that hold 99% of the texts.
        rows: of the training split.
        widths: hidden size of teacher and student, as far as they are models.
    """

    max_length: int
    rows: int
    widths: Mapping[Role, int]

    def fill_in(self, config: Config) -> Config:
        """Settle every `max_length`, `epochs` and learning rate that is null; what is explicit stays.

        Args:
            config: the experiment.
        """
        teacher, student = config.teacher, config.student
        wide, narrow = (self.widths.get(role) for role in ("teacher", "student"))
        rates = {"teacher": wide and full_rate(wide), "student": narrow and adapter_rate(narrow)}
        trains = {
            role: _without_null(
                section.train,
                max_length=self.max_length,
                epochs=epochs_for(role, self.rows, section.train.batch_size),
                learning_rate=rates[role],
            )
            for role, section in (("teacher", teacher), ("student", student))
        }
        if student.train.learning_rate is None:  # else a rate that was set holds for the adapters of every model
            teacher = _without_null(teacher, adapter_learning_rate=wide and adapter_rate(wide))
        student = _without_null(student, full_learning_rate=narrow and full_rate(narrow))
        sections = {"teacher": teacher, "student": student}
        return config.model_copy(
            update={role: section.model_copy(update={"train": trains[role]}) for role, section in sections.items()}
        )


def _without_null(section: Section, **values: Any) -> Section:
    """Fill in the keys of a section that are null."""
    return section.model_copy(update={key: value for key, value in values.items() if getattr(section, key) is None})


def choose(config: Config, splits: Splits) -> Chosen:
    """Load an experiment's models, and look at its texts.

    Args:
        config: the experiment.
        splits: its rows.
    """
    encoders = dict(loaded_models(config, splits.task))
    if not encoders:  # a bag of words alone
        return Chosen(LEAST, len(splits.train) + splits.held_out, {})
    texts = sample_texts(splits.train)
    tokenizers = [encoder.tokenizer for encoder in encoders.values()]
    lengths = [count_tokens(texts, tokenizer) for tokenizer in tokenizers]
    longest = choose_max_length(lengths, [tokenizer.model_max_length for tokenizer in tokenizers])
    widths = {role: encoder.width for role, encoder in encoders.items()}
    return Chosen(longest, len(splits.train) + splits.held_out, widths)


def settled(settings: TrainConfig, encoder: Encoder, rows: Dataset, *, adapters: bool) -> SettledTraining:
    """Settle the training of one model by its own texts and width.

    Args:
        settings: of the training.
        encoder: what is trained.
        rows: the training rows.
        adapters: whether adapters alone are trained.
    """
    length = settings.max_length
    if length is None:
        counts = count_tokens(sample_texts(rows), encoder.tokenizer)
        length = choose_max_length([counts], [encoder.tokenizer.model_max_length])
    rate = adapter_rate(encoder.width) if adapters else full_rate(encoder.width)
    epochs = epochs_for("student" if adapters else "teacher", len(rows), settings.batch_size)
    return closed(_without_null(settings, max_length=length, epochs=epochs, learning_rate=rate))


def closed(settings: TrainConfig) -> SettledTraining:
    """Give the settings of a training with nothing left open.

    Args:
        settings: of a training.

    Raises:
        ConfigError: something is.
    """
    null = [key for key in OPEN if getattr(settings, key) is None]
    if null:
        raise ConfigError(f"train.{null[0]} is null and no texts were looked at yet; set it, or use run_experiment")
    return SettledTraining(**settings.model_dump())


def cut_at(settings: TrainConfig) -> int:
    """Give `max_length`, which was settled before.

    Args:
        settings: of a training.

    Raises:
        ConfigError: it was not.
    """
    if settings.max_length is None:
        raise ConfigError("max_length is null and no texts were counted yet; set it, or use run_experiment")
    return settings.max_length


def with_recorded(config: Config, recorded: Path) -> Config:
    """Settle what an experiment's folder has settled already, so that a later call trains as the first one did.

    Args:
        config: the experiment.
        recorded: the folder's `config.yaml`; it need not be there.
    """
    if not recorded.exists():
        return config
    there = load_config(recorded)
    update = {}
    for role in ("teacher", "student"):
        here, old = getattr(config, role), getattr(there, role)
        train = _without_null(here.train, **{key: getattr(old.train, key) for key in OPEN})
        rates = [key for key in ("adapter_learning_rate", "full_learning_rate") if hasattr(old, key)]
        section = _without_null(here, **{key: getattr(old, key) for key in rates})
        update[role] = section.model_copy(update={"train": train})
    return config.model_copy(update=update)
