"""A stand-in for the API of the Hugging Face hub on a local port, in memory: what huggingface_hub asks it for.

Routes and fields are those that huggingface_hub 2.4 uses; a request that no route knows is answered with 404 and kept
in ``unknown``, so that a test can see that none was made.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from ruamel.yaml import YAML

LARGE = (".onnx", ".data", ".safetensors", ".png")
"""Suffixes that go through LFS, as the hub's .gitattributes says."""


@dataclass
class Repository:
    """Commits as file tables, the newest last."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(json.dumps([len(self.commits), sorted(files)]).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c[0] == revision), None)


class FakeHub:
    """The repositories, the blobs of LFS, and the requests that were made."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.cards: list[str] = []
        self.unknown: list[str] = []
        self.token = ""
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, value: Any = None, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", headers.get("length", str(len(data))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, kind: str) -> None:
        self.reply({"error": kind}, 404, X_Error_Code=kind)

    def route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                getattr(self, action)(*found.groups())
                return
        self.hub.unknown.append(f"{self.command} {path}")
        self.reply({"error": "no such route"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = route

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {self.hub.token}":
            return True
        self.reply({"error": "Unauthorized"}, 401)
        return False

    def revision(self, name: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        if repository is None:
            self.missing("RepoNotFound")
            return None
        found = repository.at(revision)
        if found is None:
            self.missing("RevisionNotFound")
        return found

    def info(self, name: str, revision: str = "main") -> None:
        if found := self.revision(name, revision):
            files = [{"rfilename": path} for path in found[1]]
            self.reply({"_id": "1", "id": name, "modelId": name, "sha": found[0], "siblings": files, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        if found := self.revision(name, revision):
            self.reply([self.entry(path, data) for path, data in found[1].items()])

    def entry(self, path: str, data: bytes) -> dict[str, Any]:
        sha256, git = hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        plain = {"type": "file", "path": path, "size": len(data), "oid": git}
        return (
            {**plain, "lfs": {"oid": sha256, "size": len(data), "pointerSize": 130}} if path.endswith(LARGE) else plain
        )

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (found := self.revision(name, revision)):
            return
        if path not in found[1]:
            self.missing("EntryNotFound")
            return
        data = found[1][path]
        entry = self.entry(path, data)
        etag = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if self.command == "GET":
            self.hub.fetched.append(path)
        self.reply(data, ETag=f'"{etag}"', X_Repo_Commit=found[0])

    def create(self) -> None:
        asked = json.loads(self.body())
        if not self.allowed():
            return
        name = "/".join(part for part in (asked.get("organization"), asked["name"]) if part)
        if name in self.hub.repositories:
            self.reply({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        repository = self.hub.repositories[name] = Repository(
            asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        repository.commit({".gitattributes": b"*.onnx filter=lfs\n"})
        self.reply({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def validate(self) -> None:
        content = json.loads(self.body())["content"]
        self.hub.cards.append(content)
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        errors = []
        try:
            data = YAML(typ="safe").load(found[1]) if found else None
            if data is not None and not isinstance(data, dict):
                errors.append({"message": "not a mapping"})
        except Exception as e:
            errors.append({"message": str(e)})
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self.body())
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in asked["files"]
        ]
        self.reply({"files": modes})

    def lfs_batch(self, name: str) -> None:
        asked = json.loads(self.body())
        objects = []
        for each in asked["objects"]:
            upload = {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            objects.append(each if each["oid"] in self.hub.lfs else {**each, **upload})
        self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            self.reply({"error": "digest"}, 400)
            return
        self.hub.lfs[oid] = data
        self.reply({})

    def commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines() if line]
        if not self.allowed():
            return
        repository = self.hub.repositories[name]
        files = dict(repository.commits[-1][1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(files)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})


_REPO = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{_REPO}/preupload/([^/]+)", "preupload"),
    ("POST", rf"/api/models/{_REPO}/commit/([^/]+)", "commit"),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_put"),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)", "tree"),
    ("GET", rf"/api/models/{_REPO}/revision/([^/]+)", "info"),
    ("GET", rf"/api/models/{_REPO}", "info"),
    ("GET HEAD", rf"/{_REPO}/resolve/([^/]+)/(.+)", "resolve"),
)


@contextmanager
def fake_hub(token: str = "hf_token") -> Iterator[FakeHub]:
    """Serve an empty hub whose writers need ``token``, until the context ends."""
    hub = FakeHub()
    hub.token = token
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
