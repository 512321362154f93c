"""The Hub: models loaded by id, and an experiment's student pushed with its card."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdlora.deploy.folder import MODEL_FILES, ModelFolder, is_model_file, read_model_folder, without_places
from kdlora.errors import ArtifactError, ConfigError, KdLoraError, ModelError, first_line
from kdlora.evidence.records import ExperimentLayout
from kdlora.foreign import read_json

_ONNX = "onnx/"
"""Where a repository keeps its ONNX files, as transformers.js and the Hub's own exports do."""

_MESSAGE = "Student distilled with kdlora"
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?P<inner>(/[\w.-]+)*)(@(?P<revision>[\w./-]+))?")
_ABSOLUTE = re.compile(
    r"(?<![\w/.:<&~])(?:/(?P<top>[\w.+@%-]+)/|[A-Za-z]:\\{1,2})(?:[\w.+@%-]+[/\\]{1,2})*(?P<last>[\w.+@%-]+)"
)
_OF_A_FOLDER = "Give the folder of a model, such as EXPERIMENT/student"
_ROOT_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")
_BY_HAND = ("README.md", "LICENSE", "NOTICE")
_EXPORTED = ("*.onnx", "*.onnx_data*", "*.onnx.data", "openvino_model_quantized.*")


@dataclass(frozen=True)
class Pushed:
    """What a push left on the Hub."""

    repo: str
    url: str  # of the commit
    revision: str  # hash of the commit
    private: bool  # only its owners see it
    files: tuple[str, ...]  # names in the repository of what belongs to this push
    removed: tuple[str, ...]  # those of an earlier model's files, which this one lacks


def locate_model(name: str | Path, *, revision: str | None = None) -> Path:
    """Turn what a user names as a model into a folder, by a download where it is no folder but a Hub id."""
    path, found = Path(name), _HUB_ID.fullmatch(Path(name).as_posix())
    if path.exists() or found is None or path.suffix == ".onnx":
        return path
    if found["inner"] and Path(found["repo"]).is_dir():
        raise ModelError(f"{path}: there is no such folder in {found['repo']}; check the path, or finish what makes it")
    if any((around := Path(found["repo"]).parent).glob("*/config.yaml")):  # a stranger may have the mistyped name
        raise ModelError(f"{path}: there is no such folder beside the experiments in {around}; check the path")
    if revision is not None and found["revision"] is not None and revision != found["revision"]:
        raise ConfigError(f"{name}: names the revision {found['revision']!r}, but the revision {revision!r} is given")
    inner = found["inner"].strip("/")
    snapshot = _download(found["repo"], revision or found["revision"], inner)
    if not (snapshot / inner / "config.json").is_file():
        raise ModelError(f"{name}: the Hub has {found['repo']}, but {inner or 'it'} holds no config.json")
    return snapshot / inner


def locate_export(name: str | Path) -> Path:
    """Find a model likewise; of an experiment, the export where there is one."""
    path = locate_model(name)
    export = ExperimentLayout(path).onnx
    return export if (export / "config.json").is_file() else path


def _download(repo: str, revision: str | None, inner: str) -> Path:
    """Fetch the files of a model, and nothing that runs code; what is in the cache is not fetched again."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [f"{inner}/{name}" for name in (*_ROOT_FILES, *_EXPORTED)] if inner else list(_ROOT_FILES)
    ignored = [] if inner else ["*/*", "training_args*", "optimizer*"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=ignored))
    except HFValidationError:
        raise ModelError(f"{repo}: no such folder, and no name of a Hub model. {_OF_A_FOLDER}") from None
    except RevisionNotFoundError:
        raise ModelError(f"{repo} has no revision {revision!r} on the Hub") from None
    except (RepositoryNotFoundError, LocalEntryNotFoundError, ConnectionError, _http_error()) as error:
        if not isinstance(error, RepositoryNotFoundError) and (status := _status(error)) is not None:
            asked = " Log in with `hf auth login`, and accept the model's terms there." if status in (401, 403) else ""
            raise OSError(f"the Hub answered {status} for {repo}.{asked}") from None
        where = f"in the cache, and the Hub was not asked or does not answer ({first_line(error)})"
        where = "that you may see" if isinstance(error, RepositoryNotFoundError) else where
        raise ModelError(
            f"{repo}: no such folder, no Hub model of this name {where}. {_OF_A_FOLDER}; for a private model log in "
            "with `hf auth login`"
        ) from None


def _http_error() -> type[Exception]:
    """Give what the Hub's client raises where no answer came: the error of its HTTP library, which has changed."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(one for one in HfHubHTTPError.__mro__ if one.__name__ == "HTTPError")


def _status(error: BaseException | None) -> int | None:
    """Give the status with which a server refused, if one did."""
    while error is not None:
        if (status := getattr(getattr(error, "response", None), "status_code", None)) is not None:
            return int(status)
        error = error.__cause__ or error.__context__
    return None


def push_experiment(
    experiment: str | Path,
    repo: str,
    *,
    public: bool = False,
    report: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Pushed:
    """Put an experiment's student, its ONNX export and its card into a repository of the Hub, in one commit.

    The same call again sends only what the Hub does not have yet, so an interrupted push goes on where it stopped.
    Files of an earlier model that this one lacks are removed there: an old ONNX file would answer for the new model.
    The report quotes examples of your data, so it stays here unless asked for; records and config always do.

    Args:
        experiment: an experiment folder, or a transformers model folder.
        repo: `USER/REPO`; it is made where it does not exist.
        public: make it public; else it is private, and an existing public one is refused.
        report: push `report.html` and `report.md` too.
        revision: branch; made where it does not exist.
        token: access token; by default that of `hf auth login` or of `HF_TOKEN`.

    Returns:
        Where it lies.

    Raises:
        ModelError: nothing to push.
        ConfigError: a name that no repository can have.
        KdLoraError: not allowed, or a public repository without `public`, or a private one with it.
        OSError: the Hub cannot be reached or fails.

    Examples:
        >>> pushed = push_experiment("runs/reviews", "me/reviews")
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    contents = _contents(ExperimentLayout(Path(experiment)), report, repo)
    try:
        api = HfApi(token=token)
        api.create_repo(repo, private=not public, exist_ok=True)
        private = bool(api.repo_info(repo).private)
        if not private and not public:
            raise KdLoraError(f"{repo} exists on the Hub and is public; say --public (public=True) to push there")
        if private and public:
            raise KdLoraError(f"{repo} exists on the Hub and is private; make it public there, or leave --public out")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        stale = [name for name in api.list_repo_files(repo, revision=revision) if _is_stale(name, contents)]
        changes: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        changes += [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(repo, changes, commit_message=_MESSAGE, revision=revision, num_threads=2)
    except OfflineModeIsEnabled:
        raise KdLoraError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from None
    except (_http_error(), LocalTokenNotFoundError, RuntimeError) as error:  # RuntimeError wraps a failed upload
        raise _explanation(repo, error) from None
    return Pushed(repo, str(commit.commit_url), str(commit.oid), private, tuple(sorted(contents)), tuple(stale))


def _is_stale(name: str, contents: Mapping[str, object]) -> bool:
    """Say whether a file on the Hub has the name of a model's; README and the like, and other folders, stay."""
    is_of_model = MODEL_FILES.fullmatch(name.removeprefix(_ONNX)) is not None
    return is_of_model and name not in contents and Path(name).name not in _BY_HAND


@dataclass(frozen=True)
class Parcel:
    """What a push would send."""

    sizes: dict[str, int]  # bytes of each file, by its name in the repository
    stays: tuple[str, ...]  # what lies in the same folders and is not sent: links, and files that are no model's


def plan_push(experiment: str | Path, repo: str, *, report: bool = False) -> Parcel:
    """Say what `push_experiment` would send; nothing is sent, and nobody is asked."""
    layout = ExperimentLayout(Path(experiment))
    contents = _contents(layout, report, repo)
    sizes = {
        name: len(content) if isinstance(content, bytes) else content.stat().st_size
        for name, content in sorted(contents.items())
    }
    here = {entry.name for entry in _pushable(layout.root).path.iterdir()}
    if layout.onnx.is_dir():
        here |= {f"{_ONNX}{entry.name}" for entry in layout.onnx.iterdir()}
    return Parcel(sizes, tuple(sorted(here - sizes.keys())))


def _contents(layout: ExperimentLayout, report: bool, repo: str) -> dict[str, Path | bytes]:
    """Map names in the repository to files here, or to what is sent in the place of those that name paths."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    from kdlora.report.card import FOLDER_IN_CARD  # here: models are found without what a report needs

    try:
        validate_repo_id(repo)
        found = _HUB_ID.fullmatch(repo)
    except HFValidationError:
        found = None
    if found is None or found["inner"] or found["revision"]:
        raise ConfigError(f"{repo!r} is no name of a repository; expected USER/NAME")
    student = _pushable(layout.root)
    contents: dict[str, Path | bytes] = {path.name: path for path in student.path.iterdir() if is_model_file(path)}
    if "config.json" not in contents or not any(name.endswith(".safetensors") for name in contents):
        raise ModelError(f"{student.path}: config.json or the weights are links, which are not sent; copy them there")
    if layout.config.exists() and layout.export_record.exists():
        contents |= {f"{_ONNX}{path.name}": path for path in layout.onnx.iterdir() if is_model_file(path)}
    if report:
        for path in (layout.report_md, layout.report_html):
            if not path.is_file() or path.is_symlink():
                raise ArtifactError(f"{path} is not there; write it with `kdlora report {layout.root}`")
            contents[path.name] = path
    for name in {"README.md", layout.report_md.name, layout.report_html.name} & contents.keys():
        place = Path(str(contents[name]))
        try:
            text = place.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ArtifactError(f"{place}: not UTF-8; save it as UTF-8") from None
        text = text.replace(FOLDER_IN_CARD, repo) if name == "README.md" else text
        contents[name] = shorten_paths(text, layout.root).encode()
    own = {f"{at}{name}" for at in ("", _ONNX) for name in ("config.json", "tokenizer_config.json")}
    for name in own & contents.keys():
        settings = read_json(Path(str(contents[name])))
        if (bare := without_places(settings)) == settings:
            continue
        if name.startswith(_ONNX):  # its record has the hash of the file as it is
            raise ArtifactError(f"{layout.root / name} names a path of this machine; export the student again")
        contents[name] = json.dumps(bare, indent=2).encode()
    return contents


def shorten_paths(text: str, root: Path) -> str:
    """Leave the last name of each path of this machine, for the others say who works here, and on what."""
    for place in (root.resolve(), Path.cwd(), Path.home()):
        if len(place.parts) > 1:
            text = text.replace(f"{place}/", "").replace(str(place), place.name)

    def shorten(found: re.Match[str]) -> str:
        top = found["top"]
        is_path = top is None or top in ("home", "Users") or Path("/", top).is_dir()
        return found["last"] if is_path else found[0]  # a label may look like a path

    return _ABSOLUTE.sub(shorten, text)


def _pushable(root: Path) -> ModelFolder:
    if ExperimentLayout(root).config.exists() and not ExperimentLayout(root).student.exists():
        raise ModelError(f"{root} has no student to push; run it to its end with `kdlora run`")
    for place in (ExperimentLayout(root).student, ExperimentLayout(root).onnx):
        if place.is_symlink():
            raise ArtifactError(f"{place} is a link, and what it leads to may be another model; put that in its place")
    folder = read_model_folder(root)
    if folder.backend != "transformers":
        raise ModelError(f"{root} is an ONNX export; push its experiment, which holds the transformers model as well")
    return folder


def _explanation(repo: str, error: Exception) -> KdLoraError | OSError:
    """Say of a refusal of the Hub that the user can mend how; the rest is an OSError."""
    from huggingface_hub.errors import LocalTokenNotFoundError

    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError) or (cause is error and status in (401, 403, 404)):
        return KdLoraError(
            f"the Hub does not let you write to {repo}. Log in with `hf auth login` (or set HF_TOKEN) with a token "
            "that may write, and check the name"
        )
    reason = " ".join(str(cause).split())
    return OSError(f"the push to {repo} stopped ({reason:.300}); the same command again sends only what is missing")
