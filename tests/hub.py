"""A stand-in for the Hugging Face hub's API, which takes uploads and keeps them, and for its cache on this machine."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass
class Hub:
    """What was uploaded, by repository."""

    url: str = ""
    token: str = "hf_test"
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository (`datasets/me/data`) -> path -> content."""
    messages: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)
    """Content of large files (Git LFS) by sha256."""


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self._body()
        if self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            repo = json.loads(body)
            self.hub.created.append(repo)
            kind = "datasets/" if repo.get("type") == "dataset" else ""
            return self._answer({"url": f"{self.hub.url}/{kind}{repo['organization']}/{repo['name']}"})
        if path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        repo, _, action = path.removeprefix("/api/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._answer({"files": files})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            for one in objects:
                one["actions"] = {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}
            return self._answer({"transfer": "basic", "objects": objects})
        assert action == "commit", self.path
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "header":
                self.hub.messages.append(line["value"]["summary"])
            else:
                file = line["value"]
                content = self.hub.large[file["oid"]] if line["key"] == "lfsFile" else base64.b64decode(file["content"])
                self.hub.files.setdefault(repo, {})[file["path"]] = content
        self._answer({"commitUrl": f"{self.hub.url}/{repo}/commit/1", "commitOid": "1" * 40})

    def do_PUT(self) -> None:
        content = self._body()
        assert self.path == f"/large/{hashlib.sha256(content).hexdigest()}"
        self.hub.large[self.path.removeprefix("/large/")] = content
        self._answer({})

    def do_GET(self) -> None:
        self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, *_: object) -> None:
        pass


def put_in_cache(cache: Path, repo: str, folder: Path, commit: str, revision: str) -> Path:
    """Put the files of a folder into a hub cache, as a model at a commit that a revision names; return its snapshot."""
    place = cache / f"models--{repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    return place / "snapshots" / commit


@contextlib.contextmanager
def hub_server() -> Iterator[Hub]:
    """Serve an empty hub on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
