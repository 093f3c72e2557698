"""The one place where an exception becomes a line on stderr and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import click

from qlf import launched, output

_GO_ON: Mapping[str, str] = MappingProxyType(
    {
        "convert": "run the same command with --resume to go on",
        "export": "nothing was written; run it again",
        "merge": "run the same command with --resume to go on",
        "pull": "run the same command to go on",
        "push": "nothing was published; run the same command to go on",
    }
)
_REMEDY: Mapping[int, str] = MappingProxyType(
    {
        errno.ENOSPC: "free some space and try again",
        errno.EDQUOT: "free some space and try again",
        errno.EACCES: "check the permissions, or choose another place",
        errno.EPERM: "check the permissions, or choose another place",
        errno.EROFS: "choose another place",
        errno.ENOENT: "check the path",
        errno.ENOTDIR: "a file is where a directory is needed; choose another place",
        errno.ENAMETOOLONG: "use a shorter name",
        errno.EMFILE: "raise the limit of open files (ulimit -n)",
    }
)


class InterruptedRun(Exception):
    """Ctrl-C during `command`."""

    def __init__(self, command: str | None) -> None:
        advice = _GO_ON.get(command or "")
        super().__init__(f"interrupted; {advice}" if advice else "interrupted")


class Failure(NamedTuple):
    """What the user is told: one line, the rule of the format if one was violated, and the exit code."""

    message: str
    rule: str | None
    code: int
    prefix: str = "qlf: error: "


def guard(action: Callable[[], object], args: Sequence[str]) -> int:
    """Run a command line and return its exit code.

    Args:
        action: parses and runs; an int that it returns is the exit code, anything else means 0.
        args: the arguments. They are scanned for --json and --debug, since a usage error comes before any parsing
            result exists.
    """
    known = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in known or os.environ.get("QLF_DEBUG", "0") not in ("", "0")
    try:
        code = action()
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:  # `qlf inspect ... | head` is no error worth a word
        _drop_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            import traceback

            traceback.print_exc()
        failure = explain(error)
        return _report(failure, "--json" in known) if launched.first_to_end() else failure.code


def explain(error: BaseException) -> Failure:
    """What to tell the user about an exception."""
    from qlformat.errors import QlfError

    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "qlf"
        text = " ".join(error.format_message().split()).rstrip(".")
        return Failure(f"{text[:1].lower()}{text[1:]} (see '{path} --help')", None, 2)
    if isinstance(error, click.ClickException):
        return Failure(error.format_message(), None, error.exit_code)
    if isinstance(error, (InterruptedRun, KeyboardInterrupt, click.Abort)):
        return Failure(str(error) or "interrupted", None, 130, "qlf: ")
    if isinstance(error, QlfError):
        return Failure(str(error), error.rule, 1)
    if isinstance(error, OSError):
        return Failure(_os_error(error), None, 1)
    if isinstance(error, MemoryError):
        return Failure("not enough memory", None, 1)
    if isinstance(error, RuntimeError) and _lost_peer(str(error)):
        return Failure("another process of the run is gone (killed, or out of memory?); go on with --resume", None, 1)
    detail = f"{type(error).__name__}: {error}".strip(": ")
    return Failure(f"unexpected {detail}; this is a bug, please report it with the output of --debug", None, 1)


def _lost_peer(text: str) -> bool:
    """Whether a collective operation failed because a process of the run is gone."""
    return any(part in text for part in ("gloo/transport", "Connection closed by peer", "NCCL error"))


def _os_error(error: OSError) -> str:
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    reason = error.strerror or str(error) or type(error).__name__
    text = f"{' -> '.join(names)}: {reason}" if names else reason
    remedy = _REMEDY.get(error.errno or 0)
    return f"{text}; {remedy}" if remedy else text


def _report(failure: Failure, as_json: bool) -> int:
    """Print a failure; a terminal or disk that takes no more output must not hide the exit code."""
    try:
        if as_json:
            output.emit_json({"error": {"rule": failure.rule, "message": failure.message}})
            sys.stdout.flush()
    except OSError:
        _drop_stdout()
    try:
        if failure.code == 130 and sys.stderr.isatty():
            click.echo("\r", nl=False, err=True)  # over the ^C that the terminal echoed
        output.error(failure.prefix, failure.message)
    except OSError:
        pass
    return failure.code


def _drop_stdout() -> None:
    """Point stdout at nothing, or the interpreter complains when it flushes what is still buffered."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
