"""Lines in the log that say which stage has begun and which has ended; `KDLORA_LOG=INFO` shows them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def logged(stage: str, arm: str, seed: int) -> Iterator[None]:
    """Log the begin of a stage, and its end unless it fails.

    Args:
        stage: its name.
        arm: the run's arm.
        seed: the run's seed.
    """
    logger.info("begin %s %s seed %d", stage, arm, seed)
    yield
    logger.info("end %s %s seed %d", stage, arm, seed)
