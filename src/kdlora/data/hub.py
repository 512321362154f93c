"""Data sets of the Hub, and folders written by `save_to_disk`: splits by name."""

from __future__ import annotations

import re
from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from kdlora.data.sources import Source, dataset_source
from kdlora.errors import DataError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path) -> dict[str, Source]:
    """Open a folder written by `save_to_disk`.

    Args:
        folder: the folder of a DatasetDict, or of a single Dataset, which then is the split `train`.

    Raises:
        DataError: its files are damaged.
    """
    try:
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} (data.path) is no readable save_to_disk folder ({error}); save it again") from None
    if isinstance(loaded, Dataset):
        return {"train": dataset_source(loaded, str(folder))}
    return _sources(loaded, str(folder))


def open_hub(path: str, subset: str | None, revision: str | None) -> dict[str, Source]:
    """Open a data set of the Hub, from the cache where it has been downloaded before.

    Args:
        path: its id, such as `nyu-mll/glue`.
        subset: its configuration, where it has several.
        revision: commit, tag or branch; None takes the newest.

    Raises:
        DataError: it cannot be reached, does not exist, or needs another subset.
    """
    if not _HUB_ID.match(path):
        raise DataError(
            f"data.path {path!r} is neither a folder that exists nor the id of a Hub data set such as 'nyu-mll/glue'"
        )
    # A data set of plain files would be reported to a counter on another host; nothing is asked but what is named.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        loaded = load_dataset(path, subset, revision=revision)
    except FileNotFoundError as error:  # DatasetNotFoundError is one
        raise DataError(
            f"data.path {path!r}: no such folder, and no such Hub data set ({error}); check the name"
        ) from None
    except ConnectionError as error:
        raise DataError(
            f"data.path {path!r}: there is no such folder, and the Hub cannot be reached ({error}). Run it once where "
            "the Hub answers (with HF_HUB_OFFLINE unset), or save the data there with "
            f"datasets.load_dataset({path!r}).save_to_disk(FOLDER) and set data.path to that folder"
        ) from None
    except (ValueError, RuntimeError) as error:
        hint = " Set data.subset." if "onfig" in str(error) else ""
        raise DataError(f"data.path {path!r} cannot be loaded from the Hub: {error}.{hint}") from None
    return _sources(loaded, path)


def _sources(loaded: DatasetDict, name: str) -> dict[str, Source]:
    return {split: dataset_source(dataset, f"{name}, split {split!r}") for split, dataset in loaded.items()}
