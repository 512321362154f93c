"""The study of a search: opening its storage, and counting trials that several processes share."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from kdlora.config import Config
from kdlora.errors import ArtifactError, ConfigError, first_line
from kdlora.evidence.integrity import hash_json
from kdlora.scale.plan import identity
from kdlora.scale.space import distributions, grid_of
from kdlora.searchconfig import SearchConfig

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

LOCK_SECONDS = 30.0
"""How long to wait for a database that another process has locked."""


def require_optuna() -> None:
    """Refuse a search without Optuna.

    Raises:
        ConfigError: naming the extra.
    """
    if importlib.util.find_spec("optuna") is None:
        raise ConfigError("a search needs Optuna: pip install 'kdlora[search]' brings the extra")


def study_name(config: Config, search: SearchConfig, rows: str) -> str:
    """Name the study by everything that makes its trials comparable; another space is another study.

    Args:
        config: the base.
        search: space and judgement.
        rows: fingerprint of the rows that are used.
    """
    values: dict[str, Any] = identity(config) | {"seeds": config.run.seeds[:1], "rows": rows}
    values |= {"search": search.model_dump(mode="json", exclude={"trials", "resources"})}
    digest = hash_json(values)
    return f"{config.title()}-{digest[:10]}"


def open_study(storage: str, name: str, search: SearchConfig) -> Study:
    """Open a study, which is created on first use.

    Args:
        storage: a journal file; a SQLite file (`.db`, `.sqlite`, `.sqlite3`); or a database URL as SQLAlchemy has it.
        name: of the study.
        search: sampler and pruner.

    Raises:
        ArtifactError: the storage is locked, cannot be opened, or holds something else.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings(), storage_faults(storage):
        warnings.simplefilter("ignore")
        try:
            study = optuna.create_study(
                storage=_open_storage(storage), study_name=name, direction="maximize", load_if_exists=True
            )
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:  # a journal that is none
            raise ArtifactError(f"{storage} is no search storage, or a damaged one; name another: {error!r}") from None
        study.sampler = _sampler(search, len(study.trials))
    study.pruner = optuna.pruners.NopPruner()
    if search.pruning:
        study.pruner = optuna.pruners.MedianPruner(search.pruning_startup_trials, search.pruning_warmup_epochs + 1)
    return study


def _open_storage(storage: str) -> BaseStorage:
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    url = storage
    if "://" not in storage:
        path = Path(storage).absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in (".db", ".sqlite", ".sqlite3"):
            return JournalStorage(JournalFileBackend(str(path)))
        url = f"sqlite:///{path}"
    arguments = {"connect_args": {"timeout": LOCK_SECONDS}} if url.startswith("sqlite") else {}
    return RDBStorage(url, engine_kwargs=arguments)


@contextlib.contextmanager
def storage_faults(storage: str) -> Iterator[None]:
    """Turn what a storage raises into a message on the storage.

    Args:
        storage: as the user named it.

    Raises:
        ArtifactError: in place of the storage's own exceptions.
    """
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = first_line(error.__cause__ or error)
        if "locked" in reason:
            raise ArtifactError(
                f"the search storage {storage} is locked by another process, and stayed so for {LOCK_SECONDS:.0f} s "
                f"({reason}); end that process, or name another --storage"
            ) from None
        raise ArtifactError(f"the search storage {storage} cannot be used: {reason}") from None


def _sampler(search: SearchConfig, done: int) -> BaseSampler:
    """Give a sampler that learns from the trials before; a small space is enumerated by `ask` instead."""
    from optuna.samplers import TPESampler

    # Processes that share a study must not draw the same points; one alone draws the same in every repetition.
    return TPESampler(n_startup_trials=search.startup_trials, seed=search.seed + done)


def ask(study: Study, search: SearchConfig, folder: Path) -> tuple[Trial, FileLock] | None:
    """Take the next trial, unless all are done or under way elsewhere.

    A trial whose process died is told as failed, and its point is tried again first. A trial holds a lock as long
    as its process lives, so that the dead can be told from the slow.

    Args:
        study: the study.
        search: space and number of trials.
        folder: of the search, for the locks.

    Returns:
        The trial and its lock, which the caller releases; None where there is nothing to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "ask.lock"):
        _revive(study, folder)
        grid = grid_of(search)
        most = search.trials if grid is None else int(search.count_choices())
        counted = [one for one in counted_trials(study) if one.state.name != "WAITING"]
        if len(counted) >= most:
            return None
        waiting = len(counted_trials(study)) - len(counted)
        if grid is not None and not waiting:
            study.enqueue_trial(_next_point(grid, [one.params for one in counted], search.seed))
        trial = study.ask(distributions(search))
        lock = _lock(folder, trial.number)
        lock.acquire(timeout=0)
        return trial, lock


def _next_point(grid: dict[str, list[Any]], tried: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """Choose a point of a small space that was not tried, in an order that does not favour the first key."""
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    random.Random(seed).shuffle(points)
    return next(point for point in points if point not in tried)


def counted_trials(study: Study) -> list[FrozenTrial]:
    """List the trials that count: all but those whose process died, for they are tried again.

    Args:
        study: the study.
    """
    trials = study.get_trials(deepcopy=False)
    dead = {one.user_attrs.get("continues") for one in trials}
    return [one for one in trials if one.number not in dead]


def _revive(study: Study, folder: Path) -> None:
    from optuna.trial import TrialState

    for one in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        lock = _lock(folder, one.number)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue  # its process is alive
        lock.release()
        study.tell(one.number, state=TrialState.FAIL)
        study.enqueue_trial(one.params, user_attrs={"continues": one.number})


def _lock(folder: Path, number: int) -> FileLock:
    return FileLock(folder / f"running-{number}.lock")
