"""A bar on a terminal, lines in a log, nothing of either in a short run's log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from qlf.progress import Bar, Log

from qlformat import native
from qlformat.progress import HIDDEN, Progress
from tests.cli.conftest import Run

# A tiny model is done before a bar is due; here it is due at once.
DRIVER = """
import sys
from qlf import progress
from qlf.main import main
progress.BAR_AFTER = 0.0
sys.exit(main(sys.argv[1:]))
"""

Environment = Callable[..., dict[str, str]]


def on_a_terminal(args: list[str], env: dict[str, str]) -> tuple[int, str, str]:
    """Run the driver with stderr on a terminal and stdout in a pipe; (exit code, stdout, what the terminal got)."""
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", DRIVER, *args], stdout=subprocess.PIPE, stderr=slave, env=env)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # the terminal's last writer has gone
            break
        if not part:
            break
        shown += part
    os.close(master)
    out, _ = process.communicate(timeout=120)
    return process.returncode, out.decode(), shown.decode()


@pytest.mark.parametrize("command", ["convert", "verify", "export"])
def test_bar_on_a_terminal(
    source: Path, checkpoint: Path, tmp_path: Path, child_environment: Environment, command: str
) -> None:
    args = {
        "convert": ["convert", str(source), str(tmp_path / "out")],
        "verify": ["verify", str(checkpoint)],
        "export": ["export", str(checkpoint), str(tmp_path / "out"), "--dtype", "float32"],
    }[command]
    code, out, shown = on_a_terminal(args, child_environment())
    assert code == 0
    assert re.search(r"\d+/\d+ tensors", shown) and "%" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") >= 1  # the cursor is given back
    assert "\x1b" not in out and "tensors" not in out.splitlines()[0]


def test_no_color_and_dumb_terminals(checkpoint: Path, child_environment: Environment) -> None:
    args = ["verify", str(checkpoint)]
    _, _, colored = on_a_terminal(args, child_environment())
    _, _, plain = on_a_terminal(args, child_environment(NO_COLOR="1"))
    _, _, dumb = on_a_terminal(args, child_environment(TERM="dumb"))
    color = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-7]|38|9[0-7])(?:;[\d;]*)?m")
    assert color.search(colored)
    assert "tensors" in plain and not color.search(plain)
    assert dumb == ""


def test_errors_are_red_on_a_terminal_unless_told_not_to(tmp_path: Path, child_environment: Environment) -> None:
    args = ["verify", str(tmp_path / "none")]
    assert on_a_terminal(args, child_environment())[2].startswith("\x1b[31m\x1b[1mqlf: error: \x1b[0m")
    assert on_a_terminal(args, child_environment(NO_COLOR="1"))[2].startswith("qlf: error: ")


def test_quiet_draws_nothing(source: Path, tmp_path: Path, child_environment: Environment) -> None:
    code, out, shown = on_a_terminal(["convert", "-q", str(source), str(tmp_path / "out")], child_environment())
    assert (code, shown) == (0, "") and out.startswith("Wrote ")


def test_nothing_in_a_pipe(child: Run, source: Path, tmp_path: Path) -> None:
    result = child("-c", DRIVER, "convert", source, tmp_path / "out")
    assert result.code == 0 and result.err == "" and "\x1b" not in result.out


def test_rich_is_not_imported_without_a_terminal(child: Run, source: Path, tmp_path: Path) -> None:
    code = "import sys; from qlf.main import main; main(sys.argv[1:]); print([m for m in sys.modules if m == 'rich'])"
    result = child("-c", code, "convert", source, tmp_path / "out")
    assert result.out.splitlines()[-1] == "[]"


def test_log_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    now = 0.0
    stream = io.StringIO()
    log = Log(stream, every=10.0, clock=lambda: now)
    for second in range(35):
        now = float(second)
        # A resumed run: 4 GB were there before it began.
        log.update(Progress("converting", second, 100, 4_000_000_000 + second * 100_000_000, 14_000_000_000))
    assert stream.getvalue().splitlines() == [
        "qlf: converting: 10/100 tensors, 35.7 %, 100.0 MB/s, 1 min 30 s left",
        "qlf: converting: 20/100 tensors, 42.9 %, 100.0 MB/s, 1 min 20 s left",
        "qlf: converting: 30/100 tensors, 50.0 %, 100.0 MB/s, 1 min 10 s left",
    ]


def test_missing_kernels_are_mentioned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_unavailable", lambda: "no compiler")
    now = 0.0
    stream = io.StringIO()
    log = Log(stream, every=10.0, clock=lambda: now)
    for second in range(31):
        now = float(second)
        log.update(Progress("converting", second, 100, second, 100))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "qlf: note: the slow reference code is used: no compiler"
    assert [line.split(":")[1] for line in lines[1:]] == [" converting"] * 3


def test_log_without_bytes_or_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    now = 0.0
    stream = io.StringIO()
    log = Log(stream, every=10.0, clock=lambda: now)
    now = 11.0
    log.update(Progress("pha\x1bse", 0, 0, 0, 0))
    assert stream.getvalue() == "qlf: pha\\x1bse: 0/0 tensors, 0 %\n"


def test_what_is_hidden_leaves_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: True)
    stream = io.StringIO()
    log = Log(stream, every=0.0)
    log.update(HIDDEN)
    assert stream.getvalue() == ""
    log.update(Progress("sending", 1, 8, 5, 10, "files"))
    assert "qlf: sending: 1/8 files, 50.0 %" in stream.getvalue()
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr("qlf.progress.BAR_AFTER", 0.0)
    bar = Bar()
    bar.update(Progress("sending", 1, 8, 5, 10, "files"))
    assert bar._drawn is not None and bar._drawn.live.is_started
    drawn = bar._drawn
    bar.update(HIDDEN)
    assert bar._drawn is None and not drawn.live.is_started
    bar.update(Progress("sending", 2, 8, 6, 10, "files"))  # and comes back
    assert bar._drawn is not None
    bar.close()
