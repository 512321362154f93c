"""Joining a Ray cluster, and looking at its nodes before anything runs on them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlora.config import Config
from kdlora.errors import ConfigError
from kdlora.searchconfig import Resources
from kdlora.system.environment import collect_versions

logger = logging.getLogger(__name__)

KNOCK_SECONDS = 5.0


def connect(on: str) -> Any:
    """Join a Ray cluster, or start one on this machine."""
    if on != "ray" and not on.startswith("ray://"):
        raise ConfigError(f"--on takes ray, or ray://HOST:PORT such as ray://head:10001; got {on!r}")
    try:
        import ray
    except ImportError:
        raise ConfigError("Ray is not installed: pip install 'kdlora[ray]' brings the extra") from None
    address = on if on != "ray" else os.environ.get("RAY_ADDRESS", "")
    if address and address not in ("auto", "local"):
        _knock(address)
    elif address != "local":
        _refuse_somebody_elses()
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if on == "ray":
            # Of a cluster that is started here, nothing is reported to anybody unless the user says so.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            # Its dashboard takes code from whoever reaches its port, which is every user of this machine.
            ray.init(ignore_reinit_error=True, include_dashboard=False, **options)
        else:
            ray.init(address=on, **options)
    except (ConnectionError, RuntimeError, ValueError) as fault:
        raise ConfigError(f"no Ray cluster answers at {on} ({fault}); check the address, or start one") from None
    return ray


def _refuse_somebody_elses() -> None:
    """Join no cluster that another user of this machine has noted down where Ray looks for one."""
    place = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray"
    for path in (place, place / "ray_current_cluster"):
        if hasattr(os, "getuid") and path.exists() and path.stat().st_uid not in (0, os.getuid()):
            raise ConfigError(
                f"{path} belongs to another user, and names a Ray cluster that would run your code and hand results "
                "to you; name the cluster that you mean with --on ray://HOST:PORT, or set RAY_ADDRESS=local for one "
                "of your own"
            )


def _knock(address: str) -> None:
    """Find out in seconds whether anybody listens; Ray itself would try for most of a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"expected a Ray address such as ray://head:10001, got {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
    except OSError as fault:
        raise ConfigError(
            f"no Ray cluster answers at {address} ({fault}); check the address, or start one with `ray start --head`"
        ) from None


def settle_needs(ray: Any, needs: Resources) -> Resources:
    """Say how many GPUs a run takes where that was left open: Ray hides them from a task that asks for none."""
    if needs.gpus is not None:
        return needs
    return needs.model_copy(update={"gpus": 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0})


def count_slots(ray: Any, needs: Resources) -> int:
    """Count the runs that a cluster can hold at once; at least one, for nodes may be on their way."""
    have = ray.cluster_resources()
    slots = have.get("CPU", 0) / needs.cpus
    if needs.gpus:
        slots = min(slots, have.get("GPU", 0) / needs.gpus)
    return max(1, int(slots))


def local_paths(config: Config) -> list[str]:
    """List the files and folders that a run reads; Hub ids are left out."""
    data, teacher = config.data, config.teacher
    named = [data.path, data.train, data.validation, data.test, data.unlabelled, config.student.model]
    named += [teacher.model, teacher.fine_tuned, teacher.logits, teacher.probabilities]
    return [name for name in dict.fromkeys(named) if name is not None and Path(name).is_absolute()]


def look_around(paths: Sequence[str]) -> tuple[str, list[str], dict[str, str]]:
    """Give this machine's name, which paths it lacks, and the versions of what is installed."""
    return socket.gethostname(), [path for path in paths if not Path(path).exists()], collect_versions()


def check_nodes(ray: Any, paths: Sequence[str], needs: Resources) -> None:
    """Look at every node: its paths, its kdlora, and whether any node can hold a run at all."""
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    _check_resources([node["Resources"] for node in nodes], needs)
    look = ray.remote(look_around)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    answers = [
        look.options(num_cpus=0, scheduling_strategy=place, max_retries=0).remote(list(paths)) for place in places
    ]
    faults, own = [], collect_versions()
    for node, answer in zip(nodes, answers, strict=True):
        address = node["NodeManagerAddress"]
        try:
            host, missing, versions = ray.get(answer)
        except RayError as error:
            if not any(now["Alive"] for now in ray.nodes() if now["NodeID"] == node["NodeID"]):
                continue  # it left the cluster meanwhile
            reason = str(error).strip().splitlines()[-1]
            faults.append(f"node {address} cannot run kdlora ({reason}); install the same version there")
            continue
        faults += [f"node {address} ({host}) lacks {path}" for path in missing]
        if differing := ", ".join(name for name, version in versions.items() if own.get(name) != version):
            logger.warning(
                "node %s has other versions of %s; its figures may differ in their last digits", address, differing
            )
    if faults:
        remedy = "every node needs the same folders at the same paths: mount them there, or name a Hub data set"
        raise ConfigError("\n".join([f"{remedy}:", *(f"  - {fault}" for fault in faults)]))


def _check_resources(nodes: Sequence[dict[str, float]], needs: Resources) -> None:
    """Refuse runs that no node can ever hold: Ray would wait for such a node without end."""
    gpus = needs.gpus or 0
    if not any(node.get("CPU", 0) >= needs.cpus and node.get("GPU", 0) >= gpus for node in nodes):
        sizes = "; ".join(f"{node.get('CPU', 0):g} cores and {node.get('GPU', 0):g} GPUs" for node in nodes)
        raise ConfigError(
            f"a run needs {needs.cpus:g} cores and {gpus:g} GPUs (resources), but the cluster's nodes have "
            f"{sizes or 'nothing'}"
        )
