"""A Hugging Face Hub on the loopback interface: just the routes that the real client needs to create, push and load a model repository.

    with HubServer() as hub:
        ...  # run the client in a process with HF_ENDPOINT=hub.url and HF_HUB_DISABLE_XET=1

Safetensors files take the LFS route, as on the real Hub. Repositories named "*/gated" answer as gated ones do.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Repository:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag -> commit

    def commit(self, changes: dict[str, bytes], revision: str = "main") -> str:
        files = {**self.commits.get(self.refs.get(revision, ""), {}), **changes}
        sha = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[sha] = files
        self.refs[revision] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


class HubServer:
    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}  # sha256 -> content
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route()

    do_GET = do_POST = do_PUT = do_HEAD

    def _route(self) -> None:
        self.hub: HubServer = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers["Authorization"]))
        self.body = self._read_body()
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                handle(self, **match.groupdict())
                return
        self._error(404, "RouteNotFound")

    def _read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _find(self, repo: str, revision: str = "main") -> tuple[Repository, str] | None:
        """The repository and the commit; where they do not exist, answers so and returns None."""
        repository = self.hub.repositories.get(repo)
        if repository is None:
            self._error(404, "RepoNotFound")
        elif repo.endswith("/gated"):
            self._error(403, "GatedRepo")
        elif (commit := repository.resolve(revision)) is None:
            self._error(404, "RevisionNotFound")
        else:
            return repository, commit
        return None

    def create(self) -> None:
        wish = json.loads(self.body)
        name = f"{wish.get('organization') or 'user'}/{wish['name']}"
        known = name in self.hub.repositories
        if not known:
            # huggingface_hub 2 asks for a visibility, 1 for "private"
            self.hub.repositories[name] = Repository(wish.get("visibility") == "private" or wish.get("private") is True)
            self.hub.repositories[name].commit({".gitattributes": b""})
        self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def validate_yaml(self) -> None:
        self._json({})

    def preupload(self, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            files = found[0].commits[found[1]]
            answer = []
            for path in (wish["path"] for wish in json.loads(self.body)["files"]):
                lfs = path.endswith(".safetensors")
                entry = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
                if path in files:
                    entry["oid"] = _etag(path, files[path])
                answer.append(entry)
            self._json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        objects = []
        for wish in json.loads(self.body)["objects"]:
            entry = {"oid": wish["oid"], "size": wish["size"]}
            if wish["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wish['oid']}"}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self._send(200, b"", {})

    def commit(self, repo: str, revision: str) -> None:
        if found := self._find(repo, revision):
            changes = {}
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    changes[value["path"]] = self.hub.blobs[value["oid"]]
            sha = found[0].commit(changes, revision)
            self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{sha}", "commitOid": sha})

    def info(self, repo: str, revision: str | None = None) -> None:
        if found := self._find(repo, revision or "main"):
            self._json({"id": repo, "sha": found[1], "private": found[0].private})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if found := self._find(repo, revision):
            repository, commit = found
            if path in repository.commits[commit]:
                content = repository.commits[commit][path]
                self._send(200, content, {"X-Repo-Commit": commit, "ETag": f'"{_etag(path, content)}"'})
            else:
                self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})


def _etag(path: str, content: bytes) -> str:
    if path.endswith(".safetensors"):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # git's name of a blob


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    (["POST"], r"/api/repos/create", _Handler.create),
    (["POST"], r"/api/validate-yaml", _Handler.validate_yaml),
    (["POST"], rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    (["POST"], rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _Handler.commit),
    (["GET"], rf"/api/models/{_REPO}(/revision/(?P<revision>.+))?", _Handler.info),
    (["POST"], rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (["PUT"], r"/lfs/(?P<oid>.+)", _Handler.lfs_upload),
    (["HEAD", "GET"], rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
]
