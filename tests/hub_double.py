"""A Hugging Face hub on loopback: as much of its HTTP as the real client needs to read and to push.

Repositories are commits, and commits are files by path. Weights lie in large-file storage, on a host of their
own, as on the hub. Every request is noted; answers can be made to fail.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".npz", ".pt")
PAGE = 3
"""Entries of a page of a tree: few, so that there are several."""


@dataclass
class Repo:
    """A repository."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    listed: list[dict] = field(default_factory=list)
    """Entries that trees have beside the files."""

    def commit(self, files: dict[str, bytes | None], branch: str = "main") -> str:
        """Add or, with None, delete files; the new commit."""
        parent = self.refs.get(branch, "")
        merged = {**self.commits.get(parent, {}), **files}
        commit = hashlib.sha1(f"{parent}{len(self.commits)}".encode()).hexdigest()
        self.commits[commit] = {name: data for name, data in merged.items() if data is not None}
        self.refs[branch] = commit
        return commit

    def at(self, revision: str) -> str | None:
        """The commit that a branch, a tag or a commit is."""
        return self.refs.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """The double."""

    port: int = 0
    repos: dict[str, Repo] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    writers: set[str] = field(default_factory=lambda: {"writer"})
    """Tokens that may write, and read what is private."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """(method, path), in order."""
    fails: Callable[[str, str], int | None] = lambda method, path: None
    """A status to answer (method, path) with in place of the answer."""
    cut: int = 0
    """Bytes that are missing at the end of every large file."""
    breaks: int = 0
    """How many more large files break off half way."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def storage(self) -> str:
        return f"http://localhost:{self.port}/storage"

    def repo(self, repo_id: str, files: dict[str, bytes], **options) -> Repo:
        """A repository of one commit."""
        self.repos[repo_id] = Repo(**options)
        self.repos[repo_id].commit(files)
        return self.repos[repo_id]

    def files_got(self) -> list[str]:
        """The files whose content was asked for."""
        return [path for method, path in self.requests if method == "GET" and not path.startswith("/api/")]


class FailedError(Exception):
    def __init__(self, status: int, code: str | None = None):
        self.status, self.code = status, code


@contextmanager
def serving():
    """A hub that answers until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def entry(path: str, data: bytes) -> dict:
    """What a tree tells of a file."""
    told = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if path.endswith(LARGE):
        oid = hashlib.sha256(data).hexdigest()
        told["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 130}
    return told


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    # head and body in one packet: in two, the second waits 40 ms for the first to be acknowledged
    wbufsize = -1

    def log_message(self, format, *args):
        pass

    def do_GET(self):
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            status = self.hub.fails(self.command, unquote(url.path))
            if status is not None:
                raise FailedError(status)
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, url.path)
                if found:
                    answer(self, **{name: unquote(value or "") for name, value in found.groupdict().items()})
                    return
            raise FailedError(404)
        except FailedError as failed:
            self._send(b"{}", failed.status, {"X-Error-Code": failed.code} if failed.code else {})

    def _chunks(self) -> bytes:
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def _send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int = 0):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) - cut))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) - cut])

    def _send_json(self, told, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(told).encode(), 200, {"Content-Type": "application/json", **(headers or {})})

    def _writes(self) -> bool:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") in self.hub.writers

    def _require_writer(self) -> None:
        if not self._writes():
            raise FailedError(403 if self.headers.get("Authorization") else 401)

    def _repo(self, repo_id: str) -> Repo:
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and not self._writes()):
            # without a token it does not tell which of the two
            raise FailedError(404 if self.headers.get("Authorization") else 401, "RepoNotFound")
        return repo

    def _commit(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        commit = repo.at(revision or "main")
        if commit is None:
            raise FailedError(404, "RevisionNotFound")
        return commit, repo.commits[commit]

    def info(self, repo_id: str, revision: str = "") -> None:
        commit, files = self._commit(repo_id, revision)
        repo = self.hub.repos[repo_id]
        told = {"id": repo_id, "sha": commit, "private": repo.private, "gated": repo.gated}
        self._send_json({**told, "siblings": [{"rfilename": name} for name in files]})

    def tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        _, files = self._commit(repo_id, revision)
        inside = f"{folder}/" if folder else ""
        within = {name: data for name, data in files.items() if name.startswith(inside)}
        if folder and not within:
            raise FailedError(404, "EntryNotFound")
        entries, recursive = {}, self.query.get("recursive", ["false"])[0].lower() == "true"
        for name, data in within.items():
            head, _, below = name.removeprefix(inside).partition("/")
            if below:
                oid = hashlib.sha1((inside + head).encode()).hexdigest()
                entries[inside + head] = {"type": "directory", "path": inside + head, "oid": oid, "size": 0}
            if recursive or not below:
                entries[name] = entry(name, data)
        listed = [*entries.values(), *self.hub.repos[repo_id].listed]
        start = int(self.query.get("cursor", ["0"])[0])
        headers = {}
        if start + PAGE < len(listed):
            more = f"cursor={start + PAGE}&recursive={str(recursive).lower()}"
            headers["Link"] = f'<{self.hub.endpoint}{urlsplit(self.path).path}?{more}>; rel="next"'
        self._send_json(listed[start : start + PAGE], headers)

    def paths_info(self, repo_id: str, revision: str) -> None:
        _, files = self._commit(repo_id, revision)
        told = []
        for path in parse_qs(self.body.decode()).get("paths", []):
            if path in files:
                told.append(entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                told.append({"type": "directory", "path": path, "oid": "0" * 40, "size": 0})
        self._send_json(told)

    def resolve(self, repo_id: str, revision: str, name: str) -> None:
        commit, files = self._commit(repo_id, revision)
        if self.hub.repos[repo_id].gated and not self._writes():
            raise FailedError(403, "GatedRepo")
        headers = {"X-Repo-Commit": commit}
        if name not in files:
            self._send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        if not name.endswith(LARGE):
            self._send(data, 200, {**headers, "ETag": f'"{_blob(data)}"'})
            return
        oid = hashlib.sha256(data).hexdigest()
        self.hub.stored[oid] = data
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        self._send(b"", 302, {**headers, "Location": f"{self.hub.storage}/{oid}"})

    def storage(self, oid: str) -> None:
        if self.command == "PUT":
            assert hashlib.sha256(self.body).hexdigest() == oid
            self.hub.stored[oid] = self.body
            self._send(b"")
            return
        # who asks here has shown no token: the client must not send it to another host
        assert "Authorization" not in self.headers
        data, asked = self.hub.stored[oid], re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked is None and self.hub.breaks:
            self.hub.breaks -= 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
        elif asked is None:
            self._send(data, cut=self.hub.cut)
        else:
            start = int(asked[1])
            told = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self._send(data[start:], 206, told, self.hub.cut)

    def create(self) -> None:
        self._require_writer()
        told = json.loads(self.body)
        repo_id = f"{told['organization']}/{told['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}"}
        if repo_id in self.hub.repos:
            self._send(json.dumps(url).encode(), 409)
            return
        private = told.get("private") or told.get("visibility") == "private"
        self.hub.repo(repo_id, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=bool(private))
        self._send_json(url)

    def validate(self) -> None:
        assert json.loads(self.body)["content"].startswith("---\n")
        self._send_json({"errors": [], "warnings": []})

    def branch(self, repo_id: str, name: str) -> None:
        self._require_writer()
        repo = self._repo(repo_id)
        if name in repo.refs:
            raise FailedError(409)
        repo.refs[name] = repo.refs["main"]
        self._send_json({})

    def preupload(self, repo_id: str, revision: str) -> None:
        self._require_writer()
        self._commit(repo_id, revision)
        modes = {True: "lfs", False: "regular"}
        self._send_json({
            "files": [
                {"path": one["path"], "uploadMode": modes[one["path"].endswith(LARGE)], "shouldIgnore": False}
                for one in json.loads(self.body)["files"]
            ]
        })  # fmt: skip

    def batch(self, repo_id: str) -> None:
        self._require_writer()
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.storage}/{one['oid']}", "header": {}}}}
            for one in json.loads(self.body)["objects"]
        ]
        self._send_json({"transfer": "basic", "objects": objects})

    def commit(self, repo_id: str, revision: str) -> None:
        self._require_writer()
        repo, files = self._repo(repo_id), {}
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                files[value["path"]] = None
        commit = repo.commit(files, revision)
        self._send_json({"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{commit}", "commitOid": commit})


ID = r"(?P<repo_id>[^/]+/[^/]+)"
ROUTES = [
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate),
    (rf"/api/models/{ID}", _Handler.info),
    (rf"/api/models/{ID}/revision/(?P<revision>[^/]+)", _Handler.info),
    (rf"/api/models/{ID}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", _Handler.tree),
    (rf"/api/models/{ID}/paths-info/(?P<revision>[^/]+)", _Handler.paths_info),
    (rf"/api/models/{ID}/branch/(?P<name>[^/]+)", _Handler.branch),
    (rf"/api/models/{ID}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    (rf"/api/models/{ID}/commit/(?P<revision>[^/]+)", _Handler.commit),
    (rf"/{ID}\.git/info/lfs/objects/batch", _Handler.batch),
    (rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", _Handler.resolve),
    (r"/storage/(?P<oid>[0-9a-f]{64})", _Handler.storage),
]
