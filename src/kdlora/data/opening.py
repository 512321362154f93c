"""Open what a config names, without reading rows: files, saved folders, the Hub's data sets, GLUE's own folders."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from huggingface_hub import hf_hub_download

from kdlora.config import DataConfig
from kdlora.data.labels import zeros_and_ones
from kdlora.data.logit_table import is_collection, match_collection, open_collection
from kdlora.data.parquet import UNREADABLE
from kdlora.data.read import RawTable, Source, open_dataset, open_file
from kdlora.data.spool import TEXTS, make_dataset, spool
from kdlora.data.tags import parse_tags
from kdlora.data.tasks import GlueTask, Task
from kdlora.data.word_tokens import WORDS
from kdlora.errors import ArtifactError, DataError, did_you_mean, first_line, listed
from kdlora.foreign import is_plain_name, leads_out, read_front_matter, read_json

Groups = Mapping[str, Source]
"""The sources of one split by group; a split of one source has the group ""."""

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_GLUE_ON_THE_HUB = ("nyu-mll/glue", "glue")
_USUAL_SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev"), "test": ("test",), "unlabelled": ()}

KNOWN_COLUMNS = {
    "text": (
        *("sentence1 sentence2", "premise hypothesis", "question1 question2", "question sentence", "text1 text2"),
        *("text_a text_b", "text text_pair", "query passage", "text", "sentence", "review", "content", "comment"),
        *("tweet", "document", "body", "message", "utterance", "question", "query"),
    ),
    "label": ("label", "labels", "target", "class", "category", "sentiment", "intent"),
}
"""Usual names of columns; two are a pair of texts."""
NEITHER = ("", "id", "idx", "index", "unnamed: 0", "__index_level_0__", "split")
"""Columns that are neither text nor label, where nobody says so."""


def open_examples(path: Path, known: GlueTask | None, *, plain: bool = False) -> Source:
    """Open one file, or a folder that holds one, to evaluate or predict; `plain` allows a text a line."""
    return _with_hub_columns(_open_any_file(path, "the data file", known, plain=plain), known)


def open_splits(known: GlueTask | None, data: DataConfig) -> dict[str, Groups]:
    """Open the splits that a config names, or that its data set has under the usual names, as far as there are any."""
    available = _open_path(known, data) if data.path is not None else {}
    splits: dict[str, Groups] = {}
    for split, usual in _USUAL_SPLITS.items():
        wanted: str | None = getattr(data, split)
        if wanted is None:
            taken = {getattr(data, one) for one in _USUAL_SPLITS}  # by another key, as test by data.validation
            found = next((name for name in usual if name in available and name not in taken), None)
            if found is not None:
                splits[split] = available[found]
        elif wanted in available:
            splits[split] = available[wanted]
        elif split == "unlabelled" and is_collection(Path(wanted)):
            continue  # it has columns of its own
        elif data.path is None or Path(wanted).is_file() or is_saved_dataset(Path(wanted)):
            extra = split == "unlabelled"
            source = _open_any_file(Path(wanted), f"data.{split}", known if extra else None, plain=extra)
            splits[split] = {"": source}
        else:
            raise DataError(
                f"data.{split}: {wanted!r} is neither a file, a folder of save_to_disk nor a split of {data.path}; "
                f"its splits are {', '.join(available)}.{did_you_mean(wanted, available)}"
            )
    if "train" not in splits:
        raise DataError(
            f"{data.path} (data.path) has no split 'train'; set data.train to one of {', '.join(available)}"
        )
    return {
        split: {group: _with_hub_columns(source, known) for group, source in groups.items()}
        for split, groups in splits.items()
    }


def _open_path(known: GlueTask | None, data: DataConfig) -> dict[str, Groups]:
    folder = Path(str(data.path))
    if folder.is_file():
        raise DataError(f"data.path {data.path!r} is a file; put files into data.train, data.validation and data.test")
    if not folder.is_dir():
        subset = data.subset or (known.name if known is not None and data.path in _GLUE_ON_THE_HUB else None)
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
    return dict(_open_glue_folder(folder, known))


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


# GLUE in the benchmark's own layout


def _open_glue_folder(path: Path, glue: GlueTask) -> dict[str, dict[str, Source]]:
    inside = {entry.name.casefold(): entry for entry in path.iterdir()}
    names = [name.casefold() for name in (glue.folder, glue.name)]
    folder = next((inside[name] for name in names if name in inside and inside[name].is_dir()), path)
    if not any((folder / file).is_file() for file in glue.files.values()) and folder == path:
        held = listed(sorted(entry.name for entry in inside.values()))
        raise DataError(
            f"{path} (data.path) holds neither a folder {glue.folder!r} nor the files of the GLUE task {glue.name!r} "
            f"({', '.join(glue.files.values())}); it holds {held or 'nothing'}"
        )
    splits: dict[str, dict[str, Source]] = {}
    for part, file in glue.files.items():
        split, _, group = part.partition("/")
        if split == "test" and not (folder / file).exists():
            continue  # only good for a submission to the benchmark; not every copy has it
        header = glue.headerless if split != "test" else ()
        source = open_file(folder / file, "data.path", header=header, benchmark=True)
        splits.setdefault(split, {})[group] = source
    return splits


def _open_any_file(file: Path, key: str, glue: GlueTask | None, *, plain: bool = False) -> Source:
    """Open a file that may be one of GLUE's own, whichever split it is, or a saved folder of one split."""
    if is_saved_dataset(file):
        source, *others = (splits := open_saved(file)).values()
        if others:
            raise DataError(
                f"{file} ({key}) holds the splits {', '.join(splits)}; give the folder of one of them, such as "
                f"{file / next(iter(splits))}"
            )
        return source
    if glue is None or file.suffix.lower() != ".tsv":
        return open_file(file, key, plain=plain)
    source = open_file(file, key, benchmark=True)
    if glue.headerless and len(source.columns) == len(glue.headerless) and glue.text[0] not in source.columns:
        return open_file(file, key, header=glue.headerless, benchmark=True)
    return source


def _with_hub_columns(source: Source, glue: GlueTask | None) -> Source:
    """Give the columns of a GLUE task the Hub's names, where a source has those of the benchmark's files."""
    if glue is None or source.plain:
        return source
    folded = {column.casefold(): column for column in source.columns}
    spellings = (glue.text, glue.file_text or glue.text)
    spelling = next((names for names in spellings if all(name.casefold() in folded for name in names)), None)
    if spelling is None:
        expected = " or ".join(sorted({", ".join(map(repr, names)) for names in spellings}))
        raise DataError(
            f"{source.name} lacks the text columns of the GLUE task {glue.name!r} ({expected}); "
            f"it has {', '.join(map(repr, source.columns))}"
        )
    found = {name: folded[own.casefold()] for name, own in zip(glue.text, spelling, strict=True)}
    for name in ("label", glue.file_label):
        if name in source.columns:
            found["label"] = name
    taken = {*found, *found.values()}

    def read(wanted: tuple[str, ...]) -> RawTable:
        owned = {column: found.get(column, column) for column in wanted}
        raw = source.read(tuple(owned.values()))
        named = {column: raw.class_names[own] for column, own in owned.items() if own in raw.class_names}
        return replace(raw, table=raw.table.rename_columns(list(wanted)), class_names=named)

    return replace(source, columns=(*found, *(name for name in source.columns if name not in taken)), read=read)


# Data sets of the Hub, and folders written by `save_to_disk`


def is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(folder: Path) -> dict[str, Source]:
    try:
        _check_saved(folder)
        loaded = load_from_disk(str(folder))
    except (*UNREADABLE, ArtifactError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{folder} is no readable save_to_disk folder ({error}); save it again") from None
    if isinstance(loaded, Dataset):
        return {"train": open_dataset(loaded, str(folder))}
    return _sources(loaded, str(folder))


def _check_saved(folder: Path) -> None:
    """Refuse a folder whose own JSON names files outside of it."""
    whole, parts = folder / "dataset_dict.json", [folder]
    if whole.is_file():
        names = read_json(whole)["splits"]
        parts = [folder / name for name in names if is_plain_name(name)]
        if not (names and isinstance(names, list)) or len(parts) != len(names):
            raise DataError(f"{whole}: expected names of folders beside it, got {names!r:.200}; save it again")
    for part in parts:
        files = [file["filename"] for file in read_json(part / "state.json")["_data_files"]]
        if not files:
            raise DataError(f"{part} has no rows; save it with examples, or the rest without it")
        if outside := [name for name in files if not is_plain_name(name) or leads_out(part / name)]:
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
                raise DataError(f"data.path {path!r}: its card names {file!r:.80}, which this data set does not hold")


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


def open_collection_texts(folder: Path, task: Task) -> Dataset:
    """Read ids and texts of a collection that serves as unlabelled rows."""
    collection = open_collection(folder)
    if collection.texts != len(task.text):
        remedy = "" if collection.texts else ". Label it again without --without-texts"
        raise DataError(
            f"{folder} (data.unlabelled) holds {collection.texts or 'no'} text(s) a row, but the task has "
            f"{len(task.text)}: {', '.join(task.text)}{remedy}"
        )
    match_collection(collection, task, "data.unlabelled")
    words = WORDS if task.kind == "tokens" else ()
    return make_dataset(spool(collection.batches(["id", *TEXTS[: len(task.text)], *words]), str(folder)))


def _are_flags(raw: RawTable) -> bool:
    try:
        for column in raw.table.column_names:
            zeros_and_ones(raw, column)
    except DataError:
        return False
    return True


def infer_columns(source: Source, what: Literal["text", "label"], known: Container[str] = ()) -> tuple[str, ...]:
    """Choose the columns of the one spelling that a source has, a pair before its names, or the one left by `known`."""
    folded = {column.casefold(): column for column in source.columns}
    found = [names for names in map(str.split, KNOWN_COLUMNS[what]) if all(name in folded for name in names)]
    paired = {name for names in found if len(names) == 2 for name in names}
    found = [names for names in found if len(names) == 2 or names[0] not in paired]
    if len(found) == 1:
        return tuple(folded[name] for name in found[0])
    others = NEITHER if what == "label" else (*NEITHER, *KNOWN_COLUMNS["label"], "score")
    left = [column for column in source.columns if column not in known and column.strip().casefold() not in others]
    if not found and len(left) == 1:
        return tuple(left)
    key, columns = f"task.{what} (--{what})", ", ".join(map(repr, source.columns))
    if not found:
        tagged = source.columns[-1] in parse_tags(source.columns[-1:])
        hint = ". A file with a word and its tag on each line needs the extension .conll" if tagged else ""
        if what == "label" and len(left) > 1 and _are_flags(source.read(tuple(left))):
            hint = f". Where a text may have several labels, name each: {' '.join(f'--label {one!r}' for one in left)}"
        raise DataError(f"{source.name}: which column is the {what}? Set {key}; the columns are {columns}{hint}")
    candidates = " or ".join("+".join(names) for names in found)
    raise DataError(f"{source.name}: the {what} may be {candidates}; set {key}. The columns are {columns}")
