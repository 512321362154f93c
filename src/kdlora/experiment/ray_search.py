"""A search on a Ray cluster: each task carries out one trial of a study that all nodes share."""

from __future__ import annotations

import logging
from collections.abc import Callable

from kdlora.errors import KdLoraError
from kdlora.experiment.ray_cluster import check_nodes, connect, count_slots, local_paths, settle_needs
from kdlora.experiment.search import Search, work_on

logger = logging.getLogger(__name__)


def search_on_ray(search: Search, on: str, tell: Callable[[], None]) -> None:
    """Carry out the trials of a search on a cluster; the storage counts them, so none is done twice."""
    from ray.exceptions import RayError

    ray = connect(on)
    try:
        needs = settle_needs(ray, search.settings.resources)
        check_nodes(ray, [str(search.folder / "search.yaml"), *local_paths(search.config)], needs)
        task = ray.remote(_carry_out_one).options(
            num_cpus=needs.cpus, num_gpus=needs.gpus, max_retries=needs.retries, name=search.name
        )
        pending = {task.remote(search) for _ in range(min(count_slots(ray, needs), search.settings.trials))}
        lost = 0
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            pending.discard(done[0])
            try:
                more = ray.get(done[0])
            except RayError as error:
                fault = str(error).strip().splitlines()[-1]
                logger.error("a trial was lost: %s", fault)
                lost, more = lost + 1, True
                if lost > search.settings.trials:
                    raise KdLoraError(f"trials are lost again and again, the last one by: {fault}") from None
            tell()
            if more:
                pending.add(task.remote(search))
    finally:
        ray.shutdown()


def _carry_out_one(search: Search) -> bool:
    """Carry out one trial; say whether there was one."""
    return work_on(search, most=1) > 0
