"""Data sets of the Hub, and folders written by `save_to_disk`: splits by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import hf_hub_download

from kdlora.data.read import Source, open_dataset
from kdlora.errors import ArtifactError, DataError, first_line
from kdlora.foreign import is_plain_name, read_front_matter, read_json

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path) -> dict[str, Source]:
    """Open a folder written by `save_to_disk`."""
    try:
        _check_saved(folder)
        loaded = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder} (data.path) is no readable save_to_disk folder ({error}); save it again") from None
    except ArtifactError as error:
        raise DataError(str(error)) from None
    if isinstance(loaded, Dataset):
        return {"train": open_dataset(loaded, str(folder))}
    return _sources(loaded, str(folder))


def _check_saved(folder: Path) -> None:
    """Refuse a folder whose own JSON names files outside of it."""
    whole, parts = folder / "dataset_dict.json", [folder]
    if whole.is_file():
        names = read_json(whole)["splits"]
        parts = [folder / name for name in names if is_plain_name(name)]
        if not isinstance(names, list) or len(parts) != len(names):
            raise DataError(f"{whole}: expected names of folders beside it, got {names!r:.200}; save it again")
    for part in parts:
        files = [file["filename"] for file in read_json(part / "state.json")["_data_files"]]
        if outside := [name for name in files if not is_plain_name(name)]:
            raise DataError(f"{part / 'state.json'}: names the file {outside[0]!r:.80}; expected one beside it")


def open_hub(path: str, subset: str | None, revision: str | None) -> dict[str, Source]:
    """Open a data set of the Hub, from the cache where it has been downloaded before."""
    if not _HUB_ID.match(path):
        raise DataError(
            f"data.path {path!r} is neither a folder that exists nor the id of a Hub data set such as 'nyu-mll/glue'"
        )
    # A data set of plain files would be reported to a counter on another host; nothing is asked but what is named.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        _check_card(path, revision)
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
    except DataError:
        raise
    except Exception as error:  # a card of anybody's can make `datasets` fail in any way
        causes = (error, error.__cause__)
        if full := next((cause for cause in causes if isinstance(cause, OSError) and cause.errno is not None), None):
            raise full from None  # the machine's, such as a full disk
        hint = " Set data.subset." if "onfig" in str(error) else ""
        reason = first_line(error.__cause__ or error)
        raise DataError(f"data.path {path!r} cannot be loaded from the Hub: {reason:.500}.{hint}") from None
    return _sources(loaded, path)


def _check_card(path: str, revision: str | None) -> None:
    """Refuse a card that names files elsewhere: `datasets` asks those hosts, and before 5.1 reads any file."""
    for name in ("README.md", ".huggingface.yaml"):
        try:
            card = Path(hf_hub_download(path, name, repo_type="dataset", revision=revision))
        except (OSError, ValueError):  # none, or none that can be reached: `datasets` says so itself
            continue
        try:
            files = list(_named_files(read_front_matter(card)))
        except ValueError as error:
            raise DataError(f"data.path {path!r}: its card {name} cannot be read ({first_line(error)})") from None
        for file in files:
            if "://" in file or file.startswith("/") or ".." in file.split("/"):
                raise DataError(f"data.path {path!r}: its card names {file!r:.80}, which is not of this data set")


def _named_files(metadata: Any) -> Iterator[str]:
    """Give what stands below `data_files` and `data_dir`, wherever these are: a merge of YAML hides them anywhere."""
    todo: list[tuple[Any, bool]] = [(metadata, False)]
    seen: set[tuple[int, bool]] = set()
    while todo:
        item, named = todo.pop()
        if isinstance(item, str) and named:
            yield item
        elif isinstance(item, dict | list) and (id(item), named) not in seen:
            seen.add((id(item), named))  # an alias can lead round in a circle
            pairs = item.items() if isinstance(item, dict) else (("", inner) for inner in item)
            todo += [(inner, named or key in ("data_files", "data_dir")) for key, inner in pairs]


def _sources(loaded: DatasetDict, name: str) -> dict[str, Source]:
    return {split: open_dataset(dataset, f"{name}, split {split!r}") for split, dataset in loaded.items()}
