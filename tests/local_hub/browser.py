"""Headless Chromium, and a server that notices whatever reaches it."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)

needs_chromium = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: the pages are not tried in a browser (Debian: apt-get install chromium)"
)

_QUIET = (
    "--headless",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
)


SCRIPT_TIME = "--virtual-time-budget=4000"
"""Lets the scripts of a page run for four seconds of its own time before it is written out."""


def run(profile: Path, url: str, *flags: str) -> str:
    """Open a page, and return what the flags ask for on stdout."""
    root = ("--no-sandbox",) if os.geteuid() == 0 else ()
    command = [CHROMIUM, *_QUIET, *root, f"--user-data-dir={profile}", *flags, url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def dom(profile: Path, url: str, *flags: str) -> str:
    """The page as HTML after its scripts, if it has any, have run."""
    return run(profile, url, "--dump-dom", *flags)


def screenshot(profile: Path, url: str, file: Path, width: int, height: int, *flags: str) -> bytes:
    """A picture of the page."""
    run(profile, url, f"--screenshot={file}", f"--window-size={width},{height}", *flags)
    return file.read_bytes()


_WAY = re.compile(r"/(?:base/.*|[a-z0-9-]+)")


@dataclass
class Canary:
    """A server that should hear nothing.

    Attributes:
        url: where it answers.
        heard: the paths of all requests for /NAME and below /base/.
        pages: path -> (headers, body) that it answers with; everything else is answered with an empty script.
    """

    url: str = ""
    heard: list[str] = field(default_factory=list)
    pages: dict[str, tuple[dict[str, str], bytes]] = field(default_factory=dict)


@contextlib.contextmanager
def listening() -> Iterator[Canary]:
    """A canary on a free port, until the block is left."""
    canary = Canary()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            """Keep quiet."""

        def do_GET(self) -> None:
            if self.path == "/favicon.ico":  # asked for by the browser itself
                self.send_error(404)
                return
            headers, body = canary.pages.get(self.path, ({"Content-Type": "text/javascript"}, b""))
            if self.path not in canary.pages and _WAY.fullmatch(self.path):
                canary.heard.append(self.path)
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body)), "Access-Control-Allow-Origin": "*"}.items():
                self.send_header(key, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # the browser went elsewhere
                self.wfile.write(body)

        do_POST = do_GET

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    canary.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield canary
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
