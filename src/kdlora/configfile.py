"""Configuration files: YAML in and out, overrides, paths made absolute, every fault reported at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from kdlora.config import Config
from kdlora.errors import ConfigError, did_you_mean
from kdlora.searchconfig import Choices, Range, SearchConfig

Override = str | tuple[str, Any]
_OF_DATA = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".conll", ".xlsx", ".xls")
_OF_YAML = (".yaml", ".yml", ".json")
_MOST_PARTS = 400_000  # of JSON: about four for each value
PATH_KEYS = [
    *(("data", key) for key in ("path", "train", "validation", "test", "unlabelled")),
    *(("teacher", key) for key in ("model", "fine_tuned", "logits", "probabilities")),
    ("student", "model"),
]

COLLECTION_MANIFEST = "collection.json"
"""Says what a folder holds that `kdlora label` wrote."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where plain YAML silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise ConfigError(f"a YAML merge (<<) is not read ({key_node.start_mark}); write the keys out")
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, list | dict) and key in seen:
                raise ConfigError(f"key {key!r} stands twice ({key_node.start_mark}); keep one of them")
            seen.add(key if not isinstance(key, list | dict) else repr(key))
        return super().construct_mapping(node, deep)


_BOOL = "tag:yaml.org,2002:bool"  # as in YAML 1.2: yes, no, on and off are words, as labels are; switches take them
_INT = "tag:yaml.org,2002:int"  # 010 is a code, as labels are, and not 8
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] not in (_BOOL, _INT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(_INT, re.compile("^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_UniqueKeyLoader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))


def load_config(path: str | Path, overrides: Iterable[Override] = ()) -> Config:
    """Read a configuration file.

    Args:
        path: a YAML file; relative paths in it resolve against its folder.
        overrides: `section.key=value` assignments, values in YAML, or pairs of a key and its value, applied over
            the file; relative paths in them resolve against the current folder.

    Raises:
        ConfigError: with every fault at once, each with its key, what was expected and what came.

    Examples:
        >>> load_config("configs/mrpc.yaml", ["run.seeds=[0]"]).run.seeds
        (0,)
    """
    file = Path(path)
    return build_config(read_mapping(file, "config file"), overrides, base=file.resolve().parent, where=str(file))


def load_search(
    path: str | Path, overrides: Iterable[str] = (), *, space: str | Path | None = None, trials: int | None = None
) -> tuple[Config, SearchConfig]:
    """Read a configuration file with what `kdlora search` is told.

    Args:
        path: a YAML file, perhaps with a section `search`.
        overrides: as in `load_config`.
        space: a YAML file with the space, in place of `search.space`.
        trials: in place of `search.trials`.

    Raises:
        ConfigError: with every fault at once.

    Examples:
        >>> config, settings = load_search("search.yaml", trials=2)
    """
    file = Path(path)
    values = read_mapping(file, "config file")
    if not isinstance(section := values.get("search") or {}, dict):
        raise ConfigError(f"{file}: search: expected keys such as 'space:' and 'trials:', got {section!r}")
    given = {"space": space and read_mapping(Path(space), "space file"), "trials": trials}
    values["search"] = section | {key: value for key, value in given.items() if value is not None}
    return build_search(values, overrides, base=file.resolve().parent, where=str(file))


def read_mapping(file: Path, what: str) -> dict[str, Any]:
    if file.suffix.lower() in _OF_DATA:
        raise ConfigError(
            f"{str(file)!r} is a file of data, and a {what} is YAML. Name data in a config (data.train), or give "
            "them to kdlora run by --train FILE --text COLUMN --label COLUMN"
        )
    try:
        return parse_mapping(file.read_text(encoding="utf-8"), str(file))
    except ConfigError as error:
        if file.suffix.lower() in _OF_YAML:
            raise
        raise ConfigError(f"{error}\nIf it is a file of data, give it to kdlora run by --train FILE") from None
    except FileNotFoundError:
        raise ConfigError(f"{what} {str(file)!r} does not exist; check the path") from None
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{what} {str(file)!r} cannot be read as UTF-8 text: {error}") from None


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    try:
        values = _read_yaml(text)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{where}: expected sections such as 'task:' and 'data:', got {type(values).__name__}")
    return values


def _read_yaml(text: str) -> Any:
    """Parse YAML from anywhere; what would fill the memory or the stack is a fault like any other."""
    try:
        values = yaml.load(text, Loader=_UniqueKeyLoader)
        written = json.JSONEncoder(ensure_ascii=False, default=str).iterencode(values)  # every alias written out
        for count, part in enumerate(written):
            part.encode("utf-8")  # an escape may stand for half a character, which no file can hold
            if count > _MOST_PARTS:
                raise ConfigError("it expands to more than 100,000 values; write out what is meant")
    except RecursionError:
        raise ConfigError("not valid YAML: it is nested too deep") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:  # an impossible date, a number with thousands of digits
        if "Circular" in str(error):
            raise ConfigError("an alias refers to itself; write its value out") from None
        raise ConfigError(f"not valid YAML: {error}") from None
    return values


def build_config(
    values: Mapping[str, Any], overrides: Iterable[Override] = (), *, base: Path | None = None, where: str = "config"
) -> Config:
    """Validate nested values into a `Config`.

    Args:
        values: sections by name, as in the YAML file.
        overrides: assignments as in `load_config`, or pairs of a key and its value.
        base: folder that relative paths in `values` resolve against; default: the current one.
        where: name of the source, for messages.

    Raises:
        ConfigError: with every fault at once.

    Examples:
        >>> config = build_config(
        ...     {
        ...         "task": {"text": "review", "label": "sentiment"},
        ...         "data": {"train": "reviews.csv"},
        ...         "family": "bert",
        ...     }
        ... )
        >>> config.student.model
        'distilbert-base-uncased'
    """
    return build_search(values, overrides, base=base, where=where)[0]


def build_search(
    values: Mapping[str, Any], overrides: Iterable[Override] = (), *, base: Path | None = None, where: str = "config"
) -> tuple[Config, SearchConfig]:
    """Validate nested values into a `Config`, and its section `search`, which is not part of an experiment."""
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    changes: dict[str, Any] = {}
    given = list(overrides)
    for override in given:
        assign(changes, override)
    data = [part["data"] for part in (changes, plain) if isinstance(part.get("data"), dict)]
    has_source = next((part["path"] for part in data if "path" in part), None) is not None
    try:
        merged = absolute_paths(plain, base or Path.cwd(), has_source=has_source)
        merge(merged, absolute_paths(changes, Path.cwd(), has_source=has_source))
        leaves = [*known_keys(), "search.space"]
        for key in (one.partition("=")[0].strip() if isinstance(one, str) else one[0] for one in given):
            value: Any = changes
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if key in leaves and isinstance(value, Mapping):  # such as weights by label, which are one value
                assign(merged, (key, value))
        search = merged.pop("search", None) or {}
        wanted = SearchConfig.model_validate(search)
        space = {key: _absolute_choices(key, one, base or Path.cwd()) for key, one in wanted.space.items()}
        return Config.model_validate(merged), wanted.model_copy(update={"space": space})
    except ValidationError as error:
        root: type[BaseModel] = SearchConfig if error.title == SearchConfig.__name__ else Config
        raise ConfigError(describe_faults(error, where if root is Config else f"{where}, search", root)) from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def save_config(config: Config) -> str:
    """Write a configuration as YAML that reruns the experiment from anywhere."""
    values = config.model_dump(mode="json")
    readable = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # Some control characters only survive as escapes.
    return readable if yaml.safe_load(readable) == values else yaml.safe_dump(values, sort_keys=False)


def known_keys(model: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """List every key that can be set, such as `student.train.learning_rate`."""
    keys: list[str] = []
    for name in model.model_fields:
        section = _section(model, name)
        keys += [f"{prefix}{name}"] if section is None else known_keys(section, f"{prefix}{name}.")
    return sorted(keys)


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    annotation = model.model_fields[name].annotation if name in model.model_fields else None
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def assign(values: dict[str, Any], override: Override) -> None:
    """Put one assignment into nested values: `section.key=value`, or the key and its value."""
    if isinstance(override, str):
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {override!r}: expected key=value, such as student.train.learning_rate=1e-3")
        try:
            value = json.loads(json.dumps(_read_yaml(text), default=str))  # as in a file
        except ConfigError as error:
            raise ConfigError(f"--set {override[:80]!r}: the value is {error}") from None
    else:
        key, value = override
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {parent!r} was already set to a plain value")
    values[last] = value


def merge(into: dict[str, Any], changes: Mapping[str, Any], model: type[BaseModel] | None = Config) -> None:
    """Lay changes over a config's values; mappings are merged, everything else but a section is replaced."""
    for key, value in changes.items():
        section, there = _section(model, key) if model else None, into.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            merge(there, value, section)
        elif isinstance(value, dict) and section is not None and there is not None:
            raise ConfigError(f"{key}: expected keys such as '{next(iter(section.model_fields))}:', got {there!r}")
        else:
            into[key] = value


def absolute_paths(values: dict[str, Any], base: Path, *, has_source: bool) -> dict[str, Any]:
    """Make file keys absolute; a model or data source only where it is a path and no Hub id."""
    resolved = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for section, key in PATH_KEYS:
        part = resolved.get(section)
        value = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, dict) or not isinstance(value, str):
            continue
        if "\0" in value or value.encode("utf-8", "ignore").decode() != value:
            raise ConfigError(
                f"{section}.{key}: a path holds no zero byte and is UTF-8, got {value[:80]!r}; rename what is there"
            )
        candidate = Path(os.path.realpath(base / expand_home(value)))  # `resolve` fails at a link to itself
        if key in ("path", "model", "fine_tuned"):
            is_path = value.startswith(("/", "./", "../", "~")) or candidate.exists()
        else:  # with data.path these are split names, unless a file is meant, or a folder of rows
            is_name = section == "data" and has_source
            marks = (COLLECTION_MANIFEST, "state.json", "dataset_dict.json")  # of `kdlora label`, and of save_to_disk
            is_path = not is_name or candidate.is_file() or any((candidate / mark).is_file() for mark in marks)
        part[key] = str(candidate) if is_path else value
    return resolved


def absolute_value(key: str, value: Any, base: Path, *, has_source: bool) -> Any:
    """Make the value of one dotted key absolute, as `absolute_paths` does."""
    section, _, name = key.partition(".")
    return absolute_paths({section: {name: value}}, base, has_source=has_source)[section][name]


def _absolute_choices(key: str, choices: Range | Choices, base: Path) -> Range | Choices:
    if not isinstance(choices, Choices):
        return choices
    return Choices(values=tuple(absolute_value(key, one, base, has_source=False) for one in choices.values))


def expand_home(path: str | Path) -> Path:
    """Replace `~` and `~user`; where nobody knows that home, the path stays as it is, to be missed by its name."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's own raises RuntimeError


def expand_target(out: str | Path) -> Path:
    """Replace `~` in the path of a folder that is to be written, and refuse the address of a store."""
    scheme = next(iter(Path(out).parts), "")
    if re.fullmatch(r"\w[\w+.-]+:", scheme):  # not `C:`; the rest may hold a password, and is not told
        raise ConfigError(f"expected a folder to write to, not an address ({scheme}...); mount it, and name its folder")
    return expand_home(out)


def describe_faults(error: ValidationError, where: str, root: type[BaseModel]) -> str:
    found = error.errors(include_url=False)
    inner = {fault["loc"][:-1] for fault in found}
    # A list whose one item is faulty is reported as too short as well.
    told = [fault for fault in found if fault["type"] != "too_short" or fault["loc"] not in inner]
    by_key: dict[str, list[str]] = {}
    for fault in told:
        by_key.setdefault(_key_of(fault), []).append(_describe_fault(fault, root))
    faults = list[str]()
    for key, (first, *others) in by_key.items():
        # A value that may be of several types has a fault for each of them, and so has the whole of a part.
        if not key or not any(other.startswith(f"{key}.") for other in by_key):
            faults.append(" Or ".join(dict.fromkeys([first, *(one.removeprefix(f"{key}: ") for one in others)])))
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return "\n".join([f"{where}: {count}", *(f"  - {fault}" for fault in faults)])


_UNION_TAGS = ("function-", "literal[", "tuple[", "dict[", "union[", "constrained-")
"""How pydantic names the branches of a value that may be of several types; nobody wrote them."""


def _key_of(fault: Any) -> str:
    return ".".join(part for part in map(str, fault["loc"]) if not part.startswith(_UNION_TAGS))


def _describe_fault(fault: Any, root: type[BaseModel]) -> str:
    location = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        model: type[BaseModel] | None = root
        for part in location[:-1]:
            model = _section(model, part) if model else None
        known = list(model.model_fields) if model else []
        plural = [".".join([*location[:-1], f"{location[-1]}s"])] if f"{location[-1]}s" in known else []
        elsewhere = plural or [key for key in known_keys(root) if key.endswith(f".{location[-1]}")]
        hint = f" Did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else did_you_mean(location[-1], known)
        suggestion = hint or f" Known keys: {', '.join(known)}."
        return f"{'.'.join(location)}: unknown key.{suggestion}"
    key = _key_of(fault)
    if fault["type"] == "value_error":
        return f"{key}: {fault['ctx']['error']}" if key else str(fault["ctx"]["error"])
    if fault["type"] == "missing":
        return f"{key}: this section or key is required"
    message = (fault["msg"][0].lower() + fault["msg"][1:]).replace("tuple", "list").replace(" after validation", "")
    message = message.replace("dictionary", "mapping")
    hint = ""
    if fault["type"] == "literal_error" and isinstance(fault["input"], str):
        hint = did_you_mean(fault["input"], fault["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", "))
    return f"{key}: {message}, got {fault['input']!r}.{hint}"
