"""The space of a search: checked against the config, in Optuna's words, and a trial's point put into the config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlora.config import Config
from kdlora.configfile import build_config
from kdlora.errors import ConfigError
from kdlora.searchconfig import Choices, Range, SearchConfig

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution


def with_settings(config: Config, settings: Mapping[str, Any], *, where: str = "the search") -> Config:
    """Put settings into a config.

    Args:
        config: the base.
        settings: config key to value.
        where: for messages.

    Raises:
        ConfigError: for a key that does not exist, or a value that does not fit.
    """
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return build_config(config.model_dump(mode="json"), overrides, where=where)


def check_space(config: Config, search: SearchConfig) -> None:
    """Check that every key exists, and that every value, or both ends of a range, fit the config.

    Args:
        config: the base.
        search: with the space.

    Raises:
        ConfigError: with every fault at once.
    """
    if not search.space:
        raise ConfigError(
            "there is nothing to search: set search.space in the config, or give --space FILE, such as\n"
            "  student.train.learning_rate: {low: 1e-4, high: 5e-3, log: true}\n  lora.rank: [8, 16, 32]"
        )
    faults = []
    for key, one in search.space.items():
        if key.split(".")[0] not in ("teacher", "student", "lora", "distil"):
            faults.append(f"{key}: a search is over keys of teacher, student, lora and distil; the rest is the same")
            continue
        for value in one.values if isinstance(one, Choices) else one.ends:
            try:
                with_settings(config, {key: value}, where="search.space")
            except ConfigError as fault:
                faults.append(str(fault).split("\n  - ", 1)[-1])
    if faults:
        raise ConfigError("\n".join(["search.space:", *(f"  - {fault}" for fault in dict.fromkeys(faults))]))


def distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    """Say the space in Optuna's words.

    Args:
        search: with the space.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, one in search.space.items():
        if isinstance(one, Choices):
            found[key] = CategoricalDistribution([_label(value) for value in one.values])
        elif one.whole:
            found[key] = IntDistribution(int(one.low), int(one.high), log=one.log, step=int(one.step or 1))
        else:
            found[key] = FloatDistribution(one.low, one.high, log=one.log, step=one.step)
    return found


def settings_of(search: SearchConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn a trial's point back into config values.

    Args:
        search: with the space.
        params: as Optuna keeps them.
    """
    settings: dict[str, Any] = {}
    for key, value in params.items():
        one = search.space[key]
        if isinstance(one, Choices):
            settings[key] = next(choice for choice in one.values if _label(choice) == value)
        else:
            settings[key] = value
    return settings


def grid_of(search: SearchConfig) -> dict[str, list[Any]] | None:
    """List every value of every key, where the whole space has no more points than there are trials.

    Args:
        search: with space and trials.

    Returns:
        Key to values; None for a space that a search can only sample.
    """
    if search.count_choices() > search.trials:
        return None
    return {key: _values(one) for key, one in search.space.items()}


def _values(one: Range | Choices) -> list[Any]:
    if isinstance(one, Choices):
        return [_label(value) for value in one.values]
    if one.low == one.high:
        return [one.ends[0]]
    step = one.step or 1.0
    count = int((one.high - one.low) / step + 1e-9) + 1
    values = [float(value) for value in one.low + step * np.arange(count)]
    return [int(value) for value in values] if one.whole else values


def _label(value: Any) -> Any:
    """Name a choice by a plain value, as Optuna keeps it."""
    return value if value is None or isinstance(value, bool | int | float | str) else json.dumps(value)
