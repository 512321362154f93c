"""What `accelerate launch`, `torchrun` or `mpirun` say about the processes of a run, and whether the config agrees."""

from __future__ import annotations

import os
from dataclasses import dataclass

from kdlora.config import Config
from kdlora.errors import ConfigError

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
_LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_OFF = {"", "no", "false", "0", "off"}
LAUNCH_KEYS = frozenset({*_RANK, *_COUNT, *_LOCAL, *_PLACE, "GROUP_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK"})
"""Environment variables from which a library concludes that it is one of several processes."""


@dataclass(frozen=True)
class Launch:
    """One of the processes that were started for a run."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # its number on this machine
    address: str = "127.0.0.1"  # host of process 0
    port: int = 29500  # on which the processes meet
    hosted: bool = False  # the launcher keeps the store there; else process 0 does
    attempt: str = "0"  # how often the launcher has started them again


def read_launch() -> Launch:
    """Read how many processes were started, and which of them this is."""
    count = _number(_COUNT, 1)
    if count == 1:
        has_rank = any(key in os.environ for key in _RANK)
        if "ACCELERATE_USE_CPU" in os.environ and "MASTER_PORT" in os.environ and not has_rank:
            raise ConfigError(
                "accelerate was asked for several processes, but started one, as it does on CPUs without mpirun; use "
                "torchrun --nproc-per-node 2 -m kdlora run CONFIG"
            )
        return Launch()
    rank = _number(_RANK, -1)
    if not 0 <= rank < count:
        raise ConfigError(
            f"{count} processes, but this is number {rank}; expected RANK from 0 to {count - 1}. Start the run with "
            f"torchrun --nproc-per-node {count} -m kdlora run CONFIG"
        )
    return Launch(
        rank=rank,
        count=count,
        local_rank=_number(_LOCAL, rank),
        address=os.environ.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(("MASTER_PORT",), 29500),
        hosted=os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() not in _OFF,
        attempt=os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def check_alone(verb: str) -> None:
    """Check that a verb that hands its work out by itself was not started as several processes."""
    if (count := read_launch().count) > 1:
        raise ConfigError(
            f"kdlora {verb} was started as {count} processes, which would do the same work; start it once. Several "
            "processes are for `kdlora run` without --dry-run; `suite`, `search` and `label` take --on ray"
        )


def check_launch(config: Config) -> None:
    """Check that Accelerate's settings and the config do not contradict each other."""
    engines = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM")
    allowed = dict.fromkeys((*engines, "ACCELERATE_DYNAMO_BACKEND"), _OFF)
    allowed["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] = {"", "1"}
    allowed["ACCELERATE_MIXED_PRECISION"] = _OFF | {config.run.precision}
    if config.run.device == "cuda":
        allowed["ACCELERATE_USE_CPU"] = _OFF
    found = {key: os.environ.get(key, "") for key in allowed}
    if odd := [f"{key}={value}" for key, value in found.items() if value.lower() not in allowed[key]]:
        raise ConfigError(
            f"accelerate's settings and the config contradict each other: {', '.join(odd)}. Leave these out of "
            f"accelerate's settings: kdlora trains in plain processes (DDP), and run.precision (here "
            f"{config.run.precision}), run.device and micro_batch_tokens say the rest"
        )


def _number(keys: tuple[str, ...], default: int) -> int:
    key = next((key for key in keys if key in os.environ), None)
    try:
        return default if key is None else int(os.environ[key])
    except ValueError:
        raise ConfigError(f"the environment variable {key} is {os.environ[str(key)]!r}; expected a number") from None
