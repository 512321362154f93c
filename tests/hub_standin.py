"""A stand-in of the Hub on loopback: as much of its HTTP interface as huggingface_hub and datasets use.

Repositories live in memory, with commits, branches, private ones, LFS uploads that can be made to fail, and a list of
every upload, so that a test can tell what was sent twice.
"""

import base64
import contextlib
import hashlib
import json
import posixpath
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_a_token_of_the_stand_in"
LFS_SUFFIXES = (".safetensors", ".onnx", ".parquet")
EMPTY = "0" * 40


@dataclass
class Repository:
    """One repository: its commits, and which of them each branch points to."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {EMPTY: {}})
    branches: dict[str, str] = field(default_factory=lambda: {"main": EMPTY})

    def commit(self, files: dict[str, bytes], branch: str = "main", removed: Sequence[str] = ()) -> str:
        """Put files on top of a branch, and take others away."""
        tree = self.commits[self.branches[branch]] | files
        for name in removed:
            del tree[name]
        sha = hashlib.sha1(repr(sorted((k, hashlib.sha256(v).digest()) for k, v in tree.items())).encode()).hexdigest()
        self.commits[sha] = tree
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """Find the commit of a branch or hash."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class StandIn(ThreadingHTTPServer):
    """The server and its state."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.refused_uploads = 0
        self.unknown: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def add(self, name: str, files: dict[str, bytes], *, kind: str = "models", private: bool = False) -> str:
        """Make a repository with one commit."""
        repository = self.repositories.setdefault(f"{kind}/{name}", Repository(private))
        return repository.commit(files)


def git_hash(content: bytes) -> str:
    """Hash a file as git does."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _RefusedError(Exception):
    """An answer that is no 200."""

    def __init__(self, status: int, code: str = "", content: object = None, **headers: str) -> None:
        super().__init__(status, code)
        self.status, self.content = status, content or {}
        self.headers = headers | ({"X-Error-Code": code, "X-Error-Message": code} if code else {})


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        return

    def _serve(self) -> None:
        status, headers, content = 200, {}, b""
        try:
            answer = self._answer(unquote(urlsplit(self.path).path), self._body())
            status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        except _RefusedError as refusal:
            status, headers, content = refusal.status, refusal.headers, refusal.content
        kind = "application/octet-stream" if isinstance(content, bytes) else "application/json"
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET = do_POST = do_PUT = _serve  # noqa: N815 - as http.server asks

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, path: str, body: bytes) -> Any:
        if self.command == "PUT":
            return self._upload(body, self.path.rsplit("/", 1)[-1])
        if path == "/":
            return {}
        if path == "/api/whoami-v2":
            self._authorise()
            return {"name": "someone", "type": "user", "orgs": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        parts = path.removeprefix("/api").strip("/").split("/")
        if parts[0] not in ("models", "datasets"):
            if "/resolve/" not in path:
                return self._missing()
            parts.insert(0, "models")
        length = 2 if "/".join(parts[:2]) in self.server.repositories else 3  # a name of one word, or of two
        name, (verb, *rest) = "/".join(parts[:length]), parts[length:] or ["revision", "main"]
        repository = self.server.repositories.get(name)
        if repository is None:
            raise _RefusedError(404, "RepoNotFound")
        if repository.private or (self.command == "POST" and verb != "paths-info"):
            self._authorise()
        return self._of_repository(name, repository, verb, rest, body)

    def _of_repository(self, name: str, repository: Repository, verb: str, rest: list[str], body: bytes) -> Any:
        if verb == "refs":
            pairs = repository.branches.items()
            refs = [{"name": one, "ref": f"refs/heads/{one}", "targetCommit": sha} for one, sha in pairs]
            return {"branches": refs, "tags": [], "converts": []}
        if verb == "branch":
            if rest[0] in repository.branches:
                raise _RefusedError(409)
            repository.branches[rest[0]] = repository.branches["main"]
            return {}
        if verb == "commit":
            return self._commit(name, repository, rest[0], body)
        commit = repository.resolve(rest[0])
        if commit is None:
            raise _RefusedError(404, "RevisionNotFound")
        files = repository.commits[commit]
        if verb == "resolve":
            return self._file(commit, "/".join(rest[1:]), files)
        if verb == "tree":
            return _tree(files, "/".join(rest[1:]), "recursive=true" in self.path.lower())
        if verb == "revision":
            short = name.partition("/")[2]
            about = {"_id": "1", "id": short, "modelId": short, "sha": commit, "private": repository.private}
            about |= {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
            return about | {"siblings": [{"rfilename": one} for one in files]}
        if verb == "preupload":
            return {"files": [_upload_mode(files, one["path"]) for one in json.loads(body)["files"]]}
        if verb == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
            entries = [entry for path in paths for entry in _tree(files, posixpath.dirname(path), False)]
            return [entry for entry in entries if entry["path"] in paths]
        return self._missing()

    def _upload(self, body: bytes, oid: str) -> Any:
        with self.server.lock:
            if self.server.refused_uploads > 0:
                self.server.refused_uploads -= 1
                raise _RefusedError(400, "the stand-in breaks this upload")
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.objects[oid] = body
            self.server.uploads.append(oid)
        return {}

    def _create(self, wanted: dict[str, Any]) -> Any:
        self._authorise()
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        key = f"{wanted.get('type') or 'model'}s/{name}"
        address = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if key in self.server.repositories:
            raise _RefusedError(409, content=address)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[key] = Repository(private)
        return address

    def _batch(self, wanted: dict[str, Any]) -> Any:
        objects = []
        for entry in wanted["objects"]:
            action = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}}
            known = entry["oid"] in self.server.objects
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if known else {"actions": action})})
        return {"transfer": "basic", "objects": objects}

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> Any:
        files, removed = {}, []
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                removed.append(value["path"])
        sha = repository.commit(files, revision, removed)
        address = f"{self.server.url}/{name.removeprefix('models/')}/commit/{sha}"
        return {"success": True, "commitOid": sha, "commitUrl": address}

    def _file(self, commit: str, file: str, files: dict[str, bytes]) -> Any:
        if file not in files:
            raise _RefusedError(404, "EntryNotFound", X_Repo_Commit=commit)
        content, lfs = files[file], file.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        if not (span := self.headers.get("Range", "")).startswith("bytes="):
            return 200, headers, content
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last) + 1 if last else len(content), len(content))
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
        return 206, headers, content[start:stop]

    def _authorise(self) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _RefusedError(401, "RepoNotFound")

    def _missing(self) -> Any:
        self.server.unknown.append(f"{self.command} {self.path}")
        raise _RefusedError(404)


def _upload_mode(files: dict[str, bytes], path: str) -> dict[str, Any]:
    lfs, there = path.endswith(LFS_SUFFIXES), files.get(path)
    oid = None if there is None else hashlib.sha256(there).hexdigest() if lfs else git_hash(there)
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> list[dict[str, Any]]:
    """List files and folders as the Hub does."""
    prefix = f"{below}/" if below else ""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        folder, slash, _ = path.removeprefix(prefix).partition("/")
        if slash:
            place = prefix + folder
            entries[place] = {"type": "directory", "path": place, "oid": git_hash(place.encode()), "size": 0}
            if not recursive:
                continue
        entry: dict[str, Any] = {"type": "file", "path": path, "oid": git_hash(content), "size": len(content)}
        if path.endswith(LFS_SUFFIXES):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entries[path] = entry
    return list(entries.values())


@contextlib.contextmanager
def running() -> Iterator[StandIn]:
    """Serve in a thread until the block ends."""
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def environment(server: StandIn, cache: str, *, token: bool = True) -> dict[str, str]:
    """What makes a process talk to the stand-in and to nothing else."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "3",
        "HF_HOME": cache,
        "HF_HUB_CACHE": f"{cache}/hub",
        "HF_DATASETS_CACHE": f"{cache}/datasets",
        "HF_TOKEN": TOKEN if token else "",
        "HF_TOKEN_PATH": f"{cache}/token",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
