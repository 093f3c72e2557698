"""The read endpoints of a hub on the loopback interface, for the unmodified huggingface_hub client."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

COMMIT = "5ba0" * 10
"""The commit that every revision points to."""


@dataclass
class Hub:
    """A server of the few read endpoints that huggingface_hub needs, for repositories in a directory.

    Attributes:
        sent: bytes of file content sent.
        requests: (file, Range header) of every request for content.
        ranges: whether Range headers are obeyed.
        gated: repositories that answer 403.
    """

    root: Path
    sent: int = 0
    requests: list[tuple[str, str | None]] = field(default_factory=list)
    ranges: bool = True
    gated: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        tree = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if tree:
            files = (self.hub.root / tree[1]).iterdir()
            items = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in files]
            self._answer(200, json.dumps(items).encode(), {})
        elif api:
            self._info(api[1], api[2])
        elif file:
            self._content(self.hub.root / file[1] / file[3], file[3])
        else:
            self._answer(404, b"", {})

    def _info(self, repo: str, revision: str | None) -> None:
        directory = self.hub.root / repo
        if repo in self.hub.gated:
            self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        elif not directory.is_dir():
            self._answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif revision not in (None, "main", "v1", COMMIT):
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in directory.iterdir()]
            self._answer(200, json.dumps({"id": repo, "sha": COMMIT, "siblings": files}).encode(), {})

    def _content(self, path: Path, name: str) -> None:
        wanted = self.headers.get("Range")
        if self.command == "GET":
            with self.hub.lock:
                self.hub.requests.append((name, wanted))
        if not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, status = path.read_bytes(), 200
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "") if self.hub.ranges else None
        if match:
            begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data, status = data[begin:end], 206
        with self.hub.lock:
            self.hub.sent += len(data) if self.command == "GET" else 0
        self._answer(status, data, headers)

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        try:
            self.wfile.write(body if self.command == "GET" else b"")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True


@contextlib.contextmanager
def serve_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the repositories below tmp_path/hub to the real huggingface_hub client of this process."""
    import huggingface_hub

    served = Hub(tmp_path / "hub")
    handler = type("BoundHandler", (Handler,), {"hub": served})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path / "cache")
    huggingface_hub.close_session()
    try:
        yield served
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
