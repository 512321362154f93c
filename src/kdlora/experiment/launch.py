"""What `accelerate launch`, `torchrun` or `mpirun` say about the processes of a run, and whether the config agrees."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from kdlora.config import Config
from kdlora.errors import ConfigError

_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK")
_COUNT = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
_LOCAL = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")
_PLACE = ("MASTER_ADDR", "MASTER_PORT")
_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
LAUNCH_KEYS = frozenset({*_RANK, *_COUNT, *_LOCAL, *_PLACE, "GROUP_RANK", "LOCAL_WORLD_SIZE", "ROLE_RANK"})
"""Environment variables from which a library concludes that it is one of several processes."""


@dataclass(frozen=True)
class Launch:
    """One of the processes that were started for a run.

    Attributes:
        rank: its number, from 0.
        count: of all processes.
        local_rank: its number on this machine.
        address: host of process 0.
        port: on which the processes meet.
        hosted: the launcher keeps the store there; else process 0 does.
        attempt: how often the launcher has started them again.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29500
    hosted: bool = False
    attempt: str = "0"


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read how many processes were started, and which of them this is."""
    given = os.environ if environment is None else environment
    count = _number(given, _COUNT, 1)
    if count == 1:
        # On CPUs accelerate starts one process whatever it is asked for, unless it is given mpirun or --multi_gpu.
        if "ACCELERATE_USE_CPU" in given and "MASTER_PORT" in given and not any(key in given for key in _RANK):
            raise ConfigError(
                "accelerate was asked for several processes, but started one, as it does on CPUs without mpirun. Use "
                "torchrun --nproc-per-node 2 -m kdlora run CONFIG, or accelerate launch --multi_gpu, which works on "
                "CPUs too"
            )
        return Launch()
    rank = _number(given, _RANK, -1)
    if not 0 <= rank < count:
        raise ConfigError(
            f"{count} processes, but this is number {rank}; expected RANK from 0 to {count - 1}. Start the run with "
            f"torchrun --nproc-per-node {count} -m kdlora run CONFIG"
        )
    return Launch(
        rank=rank,
        count=count,
        local_rank=_number(given, _LOCAL, rank),
        address=given.get("MASTER_ADDR", "127.0.0.1"),
        port=_number(given, ("MASTER_PORT",), 29500),
        hosted=_is_on(given, "TORCHELASTIC_USE_AGENT_STORE"),
        attempt=given.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def check_alone(verb: str) -> None:
    """Check that a verb that hands its work out by itself was not started as several processes."""
    if (count := read_launch().count) > 1:
        raise ConfigError(
            f"kdlora {verb} was started as {count} processes, which would do the same work; start it once, with --on "
            "ray for several machines. `kdlora run` alone trains with several processes"
        )


def check_launch(config: Config, environment: Mapping[str, str] | None = None) -> None:
    """Check that Accelerate's settings and the config do not contradict each other."""
    given = os.environ if environment is None else environment
    faults = []
    half = given.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if half not in ("no", config.run.precision):
        faults.append(
            f"accelerate's mixed_precision is {half}, run.precision is {config.run.precision}: leave mixed_precision "
            "out of accelerate's settings, and say it in the config"
        )
    if given.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") != "1":
        faults.append(
            "accelerate's gradient_accumulation_steps is "
            f"{given['ACCELERATE_GRADIENT_ACCUMULATION_STEPS']}, but a batch is cut by train.micro_batch_tokens: leave "
            "it out of accelerate's settings"
        )
    if given.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() not in ("no", ""):
        faults.append(
            f"accelerate's dynamo_backend is {given['ACCELERATE_DYNAMO_BACKEND'].lower()}; kdlora trains without "
            "compilation: leave it out of accelerate's settings"
        )
    if _is_on(given, "ACCELERATE_USE_CPU") and config.run.device == "cuda":
        faults.append("accelerate was started with --cpu, run.device is cuda: name one of them")
    faults += [
        f"accelerate asks for {name}, with which kdlora does not train; expected plain processes (DDP): leave it out "
        "of accelerate's settings"
        for key, name in _ENGINES.items()
        if _is_on(given, key)
    ]
    if faults:
        raise ConfigError("accelerate's settings and the config contradict each other:\n  - " + "\n  - ".join(faults))


def _is_on(given: Mapping[str, str], key: str) -> bool:
    return given.get(key, "").lower() in ("1", "true", "yes", "on")


def _number(given: Mapping[str, str], keys: tuple[str, ...], default: int) -> int:
    for key in keys:
        if key in given:
            try:
                return int(given[key])
            except ValueError:
                raise ConfigError(f"the environment variable {key} is {given[key]!r}; expected a number") from None
    return default
