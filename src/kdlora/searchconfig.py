"""What `kdlora search` can be told: the space, the number of trials, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from kdlora.config import TrainedArm
from kdlora.section import SEEDS, Section


class Range(Section):
    """Numbers from a lowest to a highest, both included."""

    low: float
    """The lowest."""
    high: float
    """The highest."""
    log: bool = False
    """Draw evenly over orders of magnitude, as suits a learning rate."""
    step: float | None = Field(default=None, gt=0.0)
    """Only the lowest plus multiples of this."""
    whole: bool = False
    """Whole numbers only."""

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is above high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range starts above 0, but low is {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other; list the values instead")
        if self.whole and not all(float(one).is_integer() for one in (self.low, self.high, self.step or 1.0)):
            raise ValueError("a range of whole numbers has whole ends")
        return self

    @property
    def values(self) -> tuple[float, float] | tuple[int, int]:
        """The lowest and the highest, as they are put into a config."""
        return (int(self.low), int(self.high)) if self.whole else (self.low, self.high)


class Choices(Section):
    """A list of values; a value may itself be a list, such as adapter targets."""

    values: tuple[Any, ...] = Field(min_length=1)
    """The values."""


_SWITCHES = {"yes": True, "on": True, "no": False, "off": False}
"""As an earlier version read them: a study is named by its values."""


def _parse_space(value: object) -> object:
    """Read `key: [values]` and `key: {low: ..., high: ...}`."""
    if not isinstance(value, Mapping):
        raise ValueError(f"expected config keys with their values or ranges, got {value!r}")  # noqa: TRY004
    space: dict[str, Any] = {}
    for key, one in _flat(value).items():
        if isinstance(one, list | tuple):
            values = [_SWITCHES.get(each, each) if isinstance(each, str) else each for each in one]
            twice = [each for place, each in enumerate(values) if each in values[:place]]
            if not values or twice:
                raise ValueError(f"{key}: " + (f"{twice[0]!r} stands twice" if twice else "there are no values"))
            space[str(key)] = Choices(values=tuple(values))
        elif isinstance(one, Mapping) and {"low", "high"} <= set(one):
            space[str(key)] = _parse_range(key, one)
        else:
            raise ValueError(f"{key}: expected a list of values, or {{low: ..., high: ...}}, got {one!r}")
    return space


def _parse_range(key: str, one: Mapping[str, Any]) -> Range:
    if unknown := set(one) - set(Range.model_fields):
        known = ", ".join(Range.model_fields)
        raise ValueError(f"{key}: unknown {', '.join(sorted(map(str, unknown)))}; a range has {known}")
    whole = all(isinstance(end, int) and not isinstance(end, bool) for end in (one["low"], one["high"]))
    try:
        return Range.model_validate({"whole": whole, **one})
    except ValidationError as fault:
        told = (": ".join([*map(str, error["loc"]), error["msg"]]) for error in fault.errors())
        raise ValueError(f"{key}: {'; '.join(told)}".replace("Value error, ", "")) from None


def _flat(value: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Join nested sections into dotted keys, down to what is a list or a range."""
    flat: dict[str, Any] = {}
    for key, one in value.items():
        is_section = isinstance(one, Mapping) and not {"low", "high"} & set(one)
        flat |= _flat(one, f"{prefix}{key}.") if is_section and one else {f"{prefix}{key}": one}
    return flat


Space = Annotated[dict[str, Range | Choices], BeforeValidator(_parse_space)]


class Resources(Section):
    """What a run needs of a node, where a cluster carries it out."""

    cpus: float = Field(default=1.0, gt=0.0)
    """Processor cores of each run."""
    gpus: float | None = Field(default=None, ge=0.0)
    """GPUs of each run. A fraction lets runs share a GPU. Default: one if the cluster has any."""
    retries: int = Field(default=3, ge=0)
    """How often a run is started again if its node or worker is lost."""


class SearchConfig(Section):
    """A search over fields of a config."""

    space: Space = Field(default_factory=dict)
    """Config key (`lora.rank`) to a list of values, or `{low, high, log, step}`; whole ends give whole numbers."""
    trials: int = Field(default=30, ge=1)
    """Number of trainings, pruned ones included, over all processes."""
    arm: TrainedArm | None = None
    """The arm that is trained. Default: `kd-lora`, else the first student arm of the config, else `fft`."""
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    """Seed of the sampler and the split. The trainings use the first of `run.seeds`."""
    validation_fraction: float = Field(default=0.1, gt=0.0, lt=1.0)
    """Share of the training rows on which trials are scored. Validation and test rows are not used."""
    startup_trials: int = Field(default=10, ge=1)
    """Number of first trials that are drawn at random."""
    pruning: bool = True
    """Stop a trial whose best score so far is below the median of the finished trials at that epoch. Never where
    the space has `epochs`, or models and `batch_size`, by which epochs are chosen: a long training learns later."""
    pruning_startup_trials: int = Field(default=5, ge=0)
    """Number of first trials that are never pruned."""
    pruning_warmup_epochs: int = Field(default=1, ge=0)
    """Epochs before a trial can be pruned."""
    resources: Resources = Resources()
    """What a trial needs of a cluster's node."""

    @property
    def names_models(self) -> bool:
        return any(key.partition(".")[2] in ("model", "revision", "from_teacher_layers") for key in self.space)
