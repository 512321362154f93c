"""A stand-in of the Hub on loopback: as much of its HTTP interface as huggingface_hub and datasets use.

Repositories live in memory, with commits, branches, private ones, LFS uploads that can be made to fail, and a list of
every upload, so that a test can tell what was sent twice.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import posixpath
import threading
from collections.abc import Iterator
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

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Put files on top of a branch."""
        tree = self.commits[self.branches[branch]] | files
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


class _Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        return

    def do_HEAD(self) -> None:
        self._read(head=True)

    def do_GET(self) -> None:
        self._read(head=False)

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self._body()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        name, parts = self._split(path.removeprefix("/api/").split("/"))
        if len(parts) < 2:
            return self._missing()
        verb, rest = parts[0], "/".join(parts[1:])
        repository = self._repository(name)
        if repository is None:
            return None
        if not self._authorised() and verb != "paths-info":
            return self._error(401, "RepoNotFound")
        if verb == "preupload":
            return self._preupload(repository, rest, json.loads(body))
        if verb == "commit":
            return self._commit(name, repository, rest, body)
        if verb == "branch":
            return self._branch(repository, rest)
        if verb == "paths-info":
            return self._paths_info(repository, rest, body)
        return self._missing()

    def do_PUT(self) -> None:
        body, oid = self._body(), self.path.rsplit("/", 1)[-1]
        with self.server.lock:
            if self.server.refused_uploads > 0:
                self.server.refused_uploads -= 1
                return self._error(400, "the stand-in breaks this upload")
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.objects[oid] = body
            self.server.uploads.append(oid)
        return self._json({})

    def _read(self, *, head: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/":
            return self._json({})
        if path.startswith("/api/"):
            return self._describe(path.removeprefix("/api/").split("/"))
        name, resolved, place = path.strip("/").partition("/resolve/")
        name = name if name.startswith(("datasets/", "models/")) else f"models/{name}"
        repository = self._repository(name) if resolved else None
        if repository is None:
            return None if resolved else self._missing()
        revision, _, file = place.partition("/")
        commit = repository.resolve(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = repository.commits[commit].get(file)
        if content is None:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        return self._file(commit, file, content, head=head)

    def _describe(self, parts: list[str]) -> None:
        if parts[0] == "whoami-v2":
            known = self._authorised()
            return self._json({"name": "someone", "type": "user", "orgs": []}) if known else self._error(401)
        if parts[0] not in ("models", "datasets") or len(parts) < 2:
            return self._missing()
        name, parts = self._split(parts)
        repository = self._repository(name)
        if repository is None:
            return None
        name = name.partition("/")[2]
        verb, rest = (parts[0], parts[1:]) if parts else ("revision", ["main"])
        if verb == "refs":
            pairs = repository.branches.items()
            refs = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in pairs]
            return self._json({"branches": refs, "tags": [], "converts": []})
        commit = repository.resolve(rest[0]) if rest else None
        if commit is None:
            return self._error(404, "RevisionNotFound")
        if verb == "tree":
            recursive = "recursive=true" in self.path.lower()
            return self._json(_tree(repository.commits[commit], "/".join(rest[1:]), recursive))
        if verb == "revision":
            siblings = [{"rfilename": name} for name in repository.commits[commit]]
            about = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repository.private}
            about |= {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
            return self._json(about | {"siblings": siblings})
        return self._missing()

    def _create(self, wanted: dict[str, Any]) -> None:
        if not self._authorised():
            return self._error(401, "RepoNotFound")
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        key = f"{wanted.get('type') or 'model'}s/{name}"
        address = {"url": f"{self.server.url}/{name}", "name": name, "id": name}
        if key in self.server.repositories:
            return self._send(409, json.dumps(address).encode(), {}, head=False, kind="application/json")
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.server.repositories[key] = Repository(private)
        return self._json(address)

    def _preupload(self, repository: Repository, revision: str, wanted: dict[str, Any]) -> None:
        tree = repository.commits[repository.resolve(revision) or EMPTY]
        answers = []
        for file in wanted["files"]:
            lfs, there = file["path"].endswith(LFS_SUFFIXES), tree.get(file["path"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if lfs else git_hash(there)
            mode = "lfs" if lfs else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self._json({"files": answers})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            action = {"upload": {"href": f"{self.server.url}/lfs/{entry['oid']}", "header": {}}}
            known = entry["oid"] in self.server.objects
            objects.append({"oid": entry["oid"], "size": entry["size"], **({} if known else {"actions": action})})
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, repository: Repository, revision: str, body: bytes) -> None:
        files = {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        sha = repository.commit(files, revision)
        address = f"{self.server.url}/{name.removeprefix('models/')}/commit/{sha}"
        return self._json({"success": True, "commitOid": sha, "commitUrl": address})

    def _branch(self, repository: Repository, branch: str) -> None:
        if branch in repository.branches:
            return self._error(409)
        repository.branches[branch] = repository.branches["main"]
        return self._json({})

    def _paths_info(self, repository: Repository, revision: str, body: bytes) -> None:
        tree = repository.commits[repository.resolve(revision) or EMPTY]
        text = body.decode()
        paths = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text).get("paths", [])
        return self._json(
            [entry for path in paths for entry in _tree(tree, posixpath.dirname(path), False) if entry["path"] == path]
        )

    def _file(self, commit: str, file: str, content: bytes, *, head: bool) -> None:
        lfs = file.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(content).hexdigest() if lfs else git_hash(content)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        start, stop, status = 0, len(content), 200
        if (span := self.headers.get("Range", "")).startswith("bytes="):
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop, status = int(first), int(last) + 1 if last else len(content), 206
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        self._send(status, content[start:stop], headers, head=head, kind="application/octet-stream")

    def _split(self, parts: list[str]) -> tuple[str, list[str]]:
        """Part the name of a repository, of one word or two, from what is asked of it."""
        short = "/".join(parts[:2])
        length = 2 if short in self.server.repositories else 3
        return "/".join(parts[:length]), parts[length:]

    def _repository(self, name: str) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and not self._authorised()):
            self._error(404 if found is None else 401, "RepoNotFound")
            return None
        return found

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {}, head=self.command == "HEAD", kind="application/json")

    def _missing(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self._error(404)

    def _error(self, status: int, code: str = "", headers: dict[str, str] | None = None) -> None:
        extra = {"X-Error-Code": code, "X-Error-Message": code} if code else {}
        self._send(status, b"{}", extra | (headers or {}), head=self.command == "HEAD", kind="application/json")

    def _send(self, status: int, content: bytes, headers: dict[str, str], *, head: bool, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(content)


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
