"""The process: where it listens, what it refuses to start with, how it bounds heads, and garbage collection."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qlformat.hub_server.collecting import collect
from tests.local_hub.asgi import Client, large, small
from tests.local_hub_fixture import ROOT, serve


def qlf(*args: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli")])
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "qlf", *args]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False)


def test_what_it_does_not_start_with(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "index.sqlite").write_text("this is no database, whatever its name may say " * 50)
    with serve(tmp_path / "root") as hub:
        port = hub.url.rpartition(":")[2]
        cases = {
            "another hub serves this directory": ("--root", str(tmp_path / "root")),
            "cannot listen on": ("--root", str(tmp_path / "second"), "--port", port),
            "not a hub's index": ("--root", str(tmp_path / "other"), "--port", "0"),
            "cannot be used": ("--root", str(tmp_path / "file"), "--port", "0"),
            "file of tokens": ("--root", str(tmp_path / "3"), "--port", "0", "--token-file", str(tmp_path / "none")),
        }
        for words, args in cases.items():
            done = qlf("hub", "serve", *args)
            assert (done.returncode, done.stdout, words in done.stderr) == (1, "", True), (words, done.stderr)
            assert done.stderr.count("\n") == 1, done.stderr


def test_it_warns_when_everybody_can_reach_it(tmp_path: Path) -> None:
    with serve(tmp_path / "root", "--host", "0.0.0.0") as hub:
        assert "everyone who reaches 0.0.0.0 may read, write and delete" in hub.log()
    with serve(tmp_path / "root") as hub:
        assert hub.url.startswith("http://127.0.0.1:")
        assert hub.log().count("everyone") == 1, "no warning for the loopback interface"


def test_heads_are_bounded(tmp_path: Path) -> None:
    with (
        serve(tmp_path / "root") as hub,
        socket.create_connection(("127.0.0.1", int(hub.url.rpartition(":")[2]))) as to,
    ):
        to.settimeout(30)
        to.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ")
        answer = b""
        with pytest.raises((ConnectionError, BrokenPipeError)):  # noqa: PT012  (it may break at any of them)
            for _ in range(10_000):
                to.sendall(b"x" * 65_536)
                time.sleep(0.01)
        to.setblocking(False)
        try:
            answer = to.recv(1000)
        except OSError:
            answer = b"HTTP/1.1 431"  # the rest of what was sent made the system drop the answer
        assert answer.startswith(b"HTTP/1.1 431")
        ok = qlf("hub", "gc", "--root", str(hub.root), "--json")
        assert ok.returncode == 0, "the server and its index work on"


def test_garbage(tmp_path: Path) -> None:
    client = Client(tmp_path / "hub")
    weights, orphan, gone = b"weights" * 1_000_000, b"orphan" * 1_000_000, b"gone" * 1_000_000
    for name in ("ann/m", "ann/gone"):
        client.create(name)
    for content in (weights, orphan, gone):
        client.upload("ann/m", content)
    client.commit("ann/m", large("w.bin", weights), small("a", b"1"))
    client.commit("ann/m", small("a", b"2"))
    client.commit("ann/gone", large("w.bin", gone), large("shared.bin", weights))
    client.ask("DELETE", "/api/repos/delete", json_body={"name": "gone", "organization": "ann"})
    assert collect(client.hub).removed == 0, "what came in today stays"
    assert collect(client.hub, older_than=0, dry_run=True).removed == 2
    done = qlf("hub", "gc", "--root", str(tmp_path / "hub"), "--older-than", "0", "--json")
    found = json.loads(done.stdout)
    assert (found["removed"], found["removed_bytes"], found["kept"]) == (2, len(orphan) + len(gone), 3)
    assert client.ask("GET", "/ann/m/resolve/main/w.bin").body == weights
    first = client.ask("GET", "/api/models/ann/m/commits/main").json[1]["id"]
    assert client.ask("GET", f"/ann/m/resolve/{first}/a").body == b"1", "the history keeps its contents"
    assert client.commit("ann/m", large("o.bin", orphan)).status == 400
    assert "no hub here" in qlf("hub", "gc", "--root", str(tmp_path / "none")).stderr
