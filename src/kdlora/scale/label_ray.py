"""Labelling on the machines of a Ray cluster: Ray Data hands out the units, a pool of actors holds the model."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kdlora.errors import ArtifactError, ConfigError, DataError, KdLoraError, ModelError
from kdlora.scale.label_plan import LabelJob, Shard, Unit

_KNOCK_SECONDS = 5.0
_ERRORS: dict[str, type[KdLoraError]] = {
    fault.__name__: fault for fault in (ArtifactError, ConfigError, DataError, ModelError, KdLoraError)
}


def label_on_ray(job: LabelJob, on: str, units: list[Unit]) -> Iterator[tuple[Unit, list[Shard]]]:
    """Do units on a cluster; whatever is done twice after the loss of a machine writes the same file.

    Args:
        job: the job; its files and folder must be there on every machine.
        on: `ray` or `ray://ADDRESS`.
        units: pieces of work.

    Yields:
        Each unit with its shards, as they are finished.

    Raises:
        ConfigError: Ray is not installed or does not answer.
        KdLoraError: what a worker reported.
    """
    if not units:
        return
    ray = connect(on)
    try:
        import ray.data

        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if job.device != "cpu" else 0
        workers = max(1, min(len(units), gpus or int(resources.get("CPU", 1))))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        items = [{"unit": json.dumps(asdict(unit))} for unit in units]
        results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Worker,
            batch_size=1,
            concurrency=(1, workers),
            num_cpus=1,
            num_gpus=1 if gpus else 0,
            fn_constructor_args=(job,),
        )
        for row in results.iter_rows():
            if row["error"]:
                name, message = json.loads(row["error"])
                raise _ERRORS.get(name, KdLoraError)(message)
            yield Unit(**json.loads(row["unit"])), [Shard(**shard) for shard in json.loads(row["shards"])]
    finally:
        ray.shutdown()


def connect(on: str) -> Any:
    """Join a Ray cluster, or start one on this machine.

    Args:
        on: `ray`: the cluster that this machine is part of, else one of its own; `ray://ADDRESS`: a Ray client's
            address such as `ray://head:10001`.

    Returns:
        The module `ray`, connected.

    Raises:
        ConfigError: Ray is not installed, the address is malformed, or nobody answers there.
    """
    if on != "ray" and not on.startswith("ray://"):
        raise ConfigError(f"--on takes ray, or ray://ADDRESS such as ray://head:10001; got {on!r}")
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'kdlora[ray]'") from None
    if on != "ray":
        _knock(on)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if on == "ray":
            ray.init(ignore_reinit_error=True, include_dashboard=False, **options)
        else:
            ray.init(address=on, **options)
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise ConfigError(
            f"no Ray cluster answers at {on} ({fault}); check the address, or start one: ray start"
        ) from None
    return ray


def _knock(address: str) -> None:
    """Find out in seconds whether anybody listens; Ray itself would try for most of a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"--on takes ray, or ray://HOST:PORT such as ray://head:10001; got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()
    except OSError as fault:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({fault}); check the address, or start one with ray start"
        ) from None


class _Worker:
    """An actor: one model in memory; called with one unit at a time."""

    def __init__(self, job: LabelJob) -> None:
        from kdlora.scale.label_work import Labeller

        self.labeller = Labeller(job)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        unit = Unit(**json.loads(str(batch["unit"][0])))
        try:
            shards, error = self.labeller.label(unit), ""
        except KdLoraError as fault:  # Ray would wrap it beyond recognition
            shards, error = [], json.dumps([type(fault).__name__, str(fault)])
        found = json.dumps([asdict(shard) for shard in shards])
        return {"unit": [json.dumps(asdict(unit))], "shards": [found], "error": [error]}
