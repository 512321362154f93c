"""Open the sources that a config names, without reading rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kdlora.config import DataConfig
from kdlora.data import glue
from kdlora.data.collection import is_collection
from kdlora.data.hub_data import is_saved_dataset, open_hub, open_saved
from kdlora.data.read import Source
from kdlora.data.tasks import GlueTask
from kdlora.errors import DataError, did_you_mean

Groups = Mapping[str, Source]
"""The sources of one split by group; a split of one source has the group ""."""

_USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",), "unlabelled": ()}


def open_examples(path: Path, known: GlueTask | None) -> Source:
    """Open one file, or a folder that holds one, to evaluate or predict."""
    if path.is_dir() and is_saved_dataset(path):
        splits = open_saved(path)
        if len(splits) > 1:
            raise DataError(f"{path} holds the splits {', '.join(splits)}; give the folder of one: {path / 'test'}")
        source = next(iter(splits.values()))
    else:
        if path.is_dir():
            files = [path / name for name in glue.SINGLE_FILE_NAMES if (path / name).is_file()]
            if known is None or not files:
                raise DataError(f"{path} is a folder; expected a data file, or a folder written by save_to_disk")
            path = files[0]
        source = glue.open_any_file(path, "the data file", known)
    return glue.with_hub_columns(source, known)


def open_splits(known: GlueTask | None, data: DataConfig) -> dict[str, Groups]:
    """Open the splits that a config names, or that its data set has under the usual names, as far as there are any."""
    available = _open_path(known, data) if data.path is not None else {}
    splits: dict[str, Groups] = {}
    for split, usual in _USUAL_SPLITS.items():
        wanted: str | None = getattr(data, split)
        if wanted is None:
            found = next((name for name in usual if name in available), None)
            if found is not None:
                splits[split] = available[found]
        elif wanted in available:
            splits[split] = available[wanted]
        elif split == "unlabelled" and is_collection(Path(wanted)):
            continue  # it has columns of its own
        elif data.path is None or Path(wanted).is_file():
            extra = split == "unlabelled"
            source = glue.open_any_file(Path(wanted), f"data.{split}", known if extra else None, plain=extra)
            splits[split] = {"": source}
        else:
            raise DataError(
                f"data.{split}: {wanted!r} is neither a file nor a split of {data.path}; its splits are "
                f"{', '.join(available)}.{did_you_mean(wanted, available)}"
            )
    if "train" not in splits:
        raise DataError(
            "no training data: set data.train to a file or to the name of a split"
            if data.path is None
            else f"{data.path} (data.path) has no split 'train'; set data.train to one of {', '.join(available)}"
        )
    return {
        split: {group: glue.with_hub_columns(source, known) for group, source in groups.items()}
        for split, groups in splits.items()
    }


def _open_path(known: GlueTask | None, data: DataConfig) -> dict[str, Groups]:
    folder = Path(str(data.path))
    if folder.is_file():
        raise DataError(f"data.path {data.path!r} is a file; put files into data.train, data.validation and data.test")
    if not folder.is_dir():
        subset = data.subset or (known.name if known is not None and data.path in glue.HUB_IDS else None)
        return _by_group(open_hub(str(data.path), subset, data.revision), known)
    if data.subset or data.revision:
        raise DataError(f"data.subset and data.revision describe a Hub data set, but data.path is the folder {folder}")
    if is_saved_dataset(folder):
        return _by_group(open_saved(folder), known)
    if known is None:
        raise DataError(
            f"{folder} (data.path) is a folder, but not one written by save_to_disk; for a folder in GLUE's layout set "
            "task.name, for files set data.train"
        )
    return dict(glue.open_glue_folder(folder, known))


def _by_group(splits: Mapping[str, Source], known: GlueTask | None) -> dict[str, Groups]:
    """Put MNLI's two validation and test splits on the Hub together."""
    if known is not None:
        splits = {split: replace(source, benchmark=True) for split, source in splits.items()}
    groups: dict[str, Groups] = {split: {"": source} for split, source in splits.items()}
    for split in ("validation", "test") if known is not None and known.name == "mnli" else ():
        parts = {group: splits.get(f"{split}_{group}") for group in ("matched", "mismatched")}
        if found := {group: source for group, source in parts.items() if source is not None}:
            groups[split] = found
    return groups
