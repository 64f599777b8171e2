"""A small Hub on loopback: the endpoints that `huggingface_hub` 0.34 to 2 calls, and its faults.

It keeps repositories as {commit: {path: bytes}} in memory and speaks just enough of the Hub's
HTTP interface to download, to list, and to upload small (inline) and large (LFS) files.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Repository:
    """Commits (newest last) and the branches and tags that name them."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # the one that opens it; None opens it to everyone
    gated: bool = False
    private: bool = False
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], ref: str = "main", message: str = "") -> str:
        """Add files to what a branch holds; returns the new commit."""
        now = {**self.commits.get(self.refs.get(ref, ""), {}), **files}
        sha = hashlib.sha1(repr((sorted(now.items()), len(self.commits))).encode()).hexdigest()
        self.commits[sha] = now
        self.refs[ref] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, a tag or the commit itself names."""
        return revision if revision in self.commits else self.refs.get(revision)


@dataclass
class HubServer:
    """What the server holds, what it is told to do wrong, and what it was asked.

    Attributes:
        drop: path of a file -> how many of its next downloads are cut off.
        drop_after: bytes that are sent before a download is cut off.
        status: path of a file, or "*" for every request -> an HTTP status to answer instead.
        seen: (method, path, headers with names in lower case) of every request.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    drop: dict[str, int] = field(default_factory=dict)
    drop_after: int = 1000
    status: dict[str, int] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    write_token: str = "hf_write"

    def add(self, name: str, files: dict[str, bytes], **options: Any) -> Repository:
        """A repository with one commit on its branch main."""
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository

    def asked(self, method: str, text: str = "") -> list[tuple[str, dict[str, str]]]:
        """The requests of one method whose path contains a text."""
        return [(path, headers) for m, path, headers in self.seen if m == method and text in path]


class _Server(ThreadingHTTPServer):
    """Ends with the connections that clients keep open, and waits for nobody."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.append(request)
        super().process_request(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def hub_server() -> Iterator[HubServer]:
    """A running server on a free port of 127.0.0.1; stopped at the end."""
    hub = HubServer()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 20

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def do_POST(self) -> None:
        self._route()

    def do_PUT(self) -> None:
        self._route()

    def _route(self) -> None:
        # A client that goes away in the middle is a matter of the test, not of the server.
        with contextlib.suppress(ConnectionError, TimeoutError):
            body = self._body()
            address = urlsplit(self.path)
            path, query = unquote(address.path), parse_qs(address.query)
            headers = {key.lower(): value for key, value in self.headers.items()}
            self.hub.seen.append((self.command, path, headers))
            if "*" in self.hub.status:
                self._error(self.hub.status["*"])
            elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", address.path):
                self._file(*map(unquote, match.groups()))
            elif path.startswith("/api/models/") and self.command == "GET":
                self._listing(address.path.removeprefix("/api/models/"))
            elif self.command in ("POST", "PUT"):
                self._write(path, query, body)
            else:
                self._error(404)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, data: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, code: str = "", message: str = "refused") -> None:
        headers = {"X_Error_Message": message, **({"X_Error_Code": code} if code else {})}
        self._answer(status, json.dumps({"error": message}).encode(), **headers)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _open(self, name: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and the commit; None where an error was answered instead."""
        repository = self.hub.repositories.get(name)
        if repository is None:
            # The real one answers 401 to those who are not logged in: it may be private.
            status = 404 if self._token() else 401
            self._error(status, "RepoNotFound", "Repository not found")
        elif repository.token is not None and self._token() != repository.token:
            if repository.gated:
                self._error(401 if self._token() is None else 403, "GatedRepo", "restricted")
            else:
                self._error(401, "RepoNotFound", "Repository not found")
        else:
            commit = repository.resolve(revision)
            if commit is not None:
                return repository, commit
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _file(self, name: str, revision: str, path: str) -> None:
        if path in self.hub.status:
            return self._error(self.hub.status[path])
        opened = self._open(name, revision)
        if opened is None:
            return None
        repository, commit = opened
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        data = repository.commits[commit].get(path)
        if data is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self._answer(404, b"", **headers)
        headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        status, total = 200, len(data)
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if wanted:
            status, start = 206, int(wanted[1])
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            data = data[start:]
        if self.command == "GET" and self.hub.drop.get(path, 0) > 0:
            self.hub.drop[path] -= 1
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(data[: self.hub.drop_after])
            self.close_connection = True
            return None
        return self._answer(status, data, **headers)

    def _listing(self, path: str) -> None:
        match = re.fullmatch(r"(.+?)(?:/(tree|revision)/([^/]+))?", path)
        name, kind, revision = match.groups() if match else ("", None, None)
        opened = self._open(unquote(name), unquote(revision or "main"))
        if opened is None:
            return
        files = sorted(opened[0].commits[opened[1]].items())
        if kind == "tree":
            self._json(
                [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in files]
            )
        else:
            siblings = [{"rfilename": file} for file, _ in files]
            self._json({"id": name, "modelId": name, "sha": opened[1], "siblings": siblings})

    def _write(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            if hashlib.sha256(body).hexdigest() != match[1]:
                return self._error(400, message="the content is not what was announced")
            self.hub.large[match[1]] = body
            return self._answer(200)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self._token() != self.hub.write_token:
            return self._error(401, message="Invalid credentials in Authorization header")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        match = re.fullmatch(r"/api/models/(.+?)/(preupload|commit|branch)/(.+)", path)
        repository = self.hub.repositories.get(match[1]) if match else None
        if match is None or repository is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        if match[2] == "branch":
            if match[3] in repository.refs:
                return self._error(409, message="Reference already exists")
            repository.refs[match[3]] = repository.refs.get("main", "")
            return self._json({})
        if match[3] not in repository.refs:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {match[3]}")
        if match[2] == "preupload":
            return self._json({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        return self._commit(match[1], repository, match[3], "create_pr" in query, body)

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        # The Hub takes text inline and what .gitattributes lists, or is large, through LFS.
        large = file["path"].endswith((".safetensors", ".msgpack", ".bin"))
        mode = "lfs" if large else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted.get('organization') or 'someone'}/{wanted['name']}"
        address = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        if name in self.hub.repositories:
            return self._json({**address, "error": "You already created this model repo"}, 409)
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        # A new repository has one commit, as it has there.
        first = {".gitattributes": b"*.safetensors filter=lfs\n"}
        self.hub.add(name, first, private=private)
        return self._json(address)

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = []
        for entry in wanted["objects"]:
            upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}"}
            known = entry["oid"] in self.hub.large
            objects.append({**entry, **({} if known else {"actions": {"upload": upload}})})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(
        self, name: str, repository: Repository, branch: str, pull_request: bool, body: bytes
    ) -> None:
        files, message = {}, ""
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                return self._error(400, message=f"cannot do {line['key']}")
        ref = "refs/pr/1" if pull_request else branch
        if pull_request:
            repository.refs[ref] = repository.refs.get(branch, "")
        sha = repository.commit(files, ref, message)
        answer = {"success": True, "commitOid": sha, "hookOutput": ""}
        answer["commitUrl"] = f"{self.hub.url}/{name}/commit/{sha}"
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/1"
        return self._json(answer)
