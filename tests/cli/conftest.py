"""Running `qlf` in the tests: in this process where that suffices, else as a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from qlf.main import main

from tests.builders import build_checkpoint, build_source

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    """Exit code and output of one command line."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one JSON object."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    @property
    def error(self) -> str:
        """The one line on stderr."""
        assert self.err.endswith("\n") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.err
        return self.err.rstrip("\n")


Run = Callable[..., Result]


@pytest.fixture
def qlf(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: qlf("convert", source, out)."""

    def run(*args: object) -> Result:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: imports as in this process, no colors by accident, no Hub."""
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "QLF_DEBUG")}
    path = os.pathsep.join([str(ROOT), str(ROOT / "cli"), kept.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TERM": "xterm", "COLUMNS": "100", **extra}


@pytest.fixture
def child() -> Run:
    """Run Python with these arguments in a process of its own: child("-m", "qlf", "--help")."""

    def run(*args: object, env: Mapping[str, str] | None = None) -> Result:
        command = [sys.executable, *(str(arg) for arg in args)]
        done = subprocess.run(
            command, env=environment(**(env or {})), capture_output=True, text=True, timeout=120, check=False
        )
        return Result(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def child_environment() -> Callable[..., dict[str, str]]:
    """`environment`, for tests that start a process themselves."""
    return environment


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A tiny bfloat16 Llama."""
    return build_source(tmp_path / "source")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny sound checkpoint."""
    build_checkpoint(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may look for a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("QLF_DEBUG", raising=False)
