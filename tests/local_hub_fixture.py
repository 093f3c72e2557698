"""`qlf hub serve` in a process of its own, for tests of whatever talks to a hub."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

WRITE_TOKEN = "hf_write_0123456789abcdef"
READ_TOKEN = "hf_read_0123456789abcdef"


class LocalHub:
    """A running server.

    Attributes:
        url: where it answers; stays the same over a restart.
        token: a token with the right to write.
        root: its directory.
    """

    def __init__(self, root: Path, options: list[str]) -> None:
        self.root = root
        self.token = WRITE_TOKEN
        self._options = options
        self._port = 0
        self.process: subprocess.Popen[str]
        self.url = self._start()

    def _start(self) -> str:
        command = [sys.executable, "-m", "qlf", "hub", "serve", "--root", str(self.root), "--port", str(self._port)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), os.environ.get("PYTHONPATH", "")])
        log = (self.root.parent / f"{self.root.name}.log").open("ab")
        with log:
            self.process = subprocess.Popen(
                [*command, *self._options],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.startswith("Serving "):
            self.process.wait()
            raise RuntimeError(f"qlf hub serve said {line!r}: {self.log()}")
        url = line.split()[1]
        self._port = int(url.rpartition(":")[2])
        return url

    def log(self) -> str:
        """What the server wrote on stderr."""
        return (self.root.parent / f"{self.root.name}.log").read_text(encoding="utf-8")

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self._reap()

    def stop(self) -> int:
        """Ctrl-C; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self._reap()

    def restart(self) -> None:
        """Start again on the same address."""
        self.url = self._start()

    def _reap(self) -> int:
        code = self.process.wait(timeout=30)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return code


def write_tokens(file: Path) -> Path:
    """A file with the two tokens above."""
    file.touch(mode=0o600)
    file.write_text(f"write ann {WRITE_TOKEN}\nread  bob {READ_TOKEN}\n", encoding="utf-8")
    return file


@contextlib.contextmanager
def serve(root: Path, *options: str, token_file: Path | None = None) -> Iterator[LocalHub]:
    """A server on a free port of the loopback interface, until the block is left.

    Args:
        root: its directory.
        options: further options of `qlf hub serve`.
        token_file: who may read and write; without it, everybody.
    """
    extra = ["--token-file", str(token_file)] if token_file else []
    hub = LocalHub(root, [*options, *extra])
    try:
        yield hub
    finally:
        if hub.process.poll() is None:
            hub.kill()
