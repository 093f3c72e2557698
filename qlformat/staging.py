"""Atomic directory output: write beside the target, flush it to the disk, rename it into place.

The staging directory of OUT is `.OUT.qlf-partial` beside it, locked while a process writes there. The lock dies with
the process, so a killed run blocks nobody and its directory can be resumed or cleared.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Self

from qlformat.errors import TargetError

LOCK_NAME = ".qlf-lock"
_WRITE_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.ENAMETOOLONG))
"""Errors that only writing can cause, or nearly so; their exceptions often carry no file name."""


def target_error(error: OSError, path: Path) -> TargetError:
    """One line for a failure to write under `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        quota = " (or your quota)" if error.errno == errno.EDQUOT else ""
        return TargetError(f"{path}: the disk{quota} is full, {_free_text(path)}; free some space or write elsewhere")
    if error.errno in (errno.EACCES, errno.EPERM):
        return TargetError(f"{path}: no permission to write here; choose another target or change its permissions")
    if error.errno == errno.EROFS:
        return TargetError(f"{path}: the file system is read-only; choose another target")
    if error.errno == errno.EFBIG:
        return TargetError(f"{path}: a file would exceed the size limit here; use a smaller --shard-size")
    if error.errno == errno.ENAMETOOLONG:
        return TargetError(f"{path}: the name is too long for the file system; choose a shorter one")
    return TargetError(f"{path}: cannot write here: {error.strerror or error}")


def free_bytes(directory: Path) -> int:
    """Bytes that this user may still write on the file system of `directory` (or of its nearest existing parent)."""
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def require_space(directory: Path, needed: int) -> None:
    """Refuse before the first byte when `needed` bytes do not fit.

    Raises:
        TargetError: too little space is free.
    """
    free = free_bytes(directory)
    if free < needed:
        raise TargetError(
            f"{directory}: found {size_text(free)} free, needed {size_text(needed)}; free some space or write elsewhere"
        )


def size_text(count: int) -> str:
    """A byte count for people, in powers of 1000: "4.13 GB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"


class Staging:
    """A locked directory to write in, which `commit` renames to the target.

    As a context manager it discards everything when the block fails (unless `keep` is set), and turns errors of
    writing into TargetError. A block that ends without `commit` discards too.

    Args:
        out: the final directory. Missing parents are made.
        overwrite: replace an existing model directory.
        resume: keep what an interrupted run left in the staging directory.
        source: what is read; writing over it, or over a directory that holds it, is refused.

    Attributes:
        out: the final directory, links resolved.
        path: the directory to write in.
        resumed: whether `path` already existed and was kept.
        keep: when true, leaving the block by an exception keeps the directory for a later resume.

    Raises:
        TargetError: the target exists, is not a directory to replace, is being written by another process, or cannot
            be written.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, resume: bool = False, source: Path | None = None) -> None:
        self.out = Path(os.path.realpath(out))
        self.path = self.out.parent / f".{self.out.name}.qlf-partial"
        self.keep = False
        self._overwrite = overwrite
        self._old = self.out.parent / f".{self.out.name}.qlf-old"
        self._parents = _missing_parents(self.out)
        self._lock = -1
        self.resumed = True
        try:
            _check_target(self.out, source)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.resumed = self._acquire()
            self._recover()
            _check_existing(self.out, overwrite)
            if self.resumed and not resume:
                self._clear()
                self.resumed = False
        except BaseException as error:
            if self.resumed:
                self.release()  # what an interrupted run left may still be wanted
            else:
                self.discard()
            if isinstance(error, OSError):
                raise target_error(error, self.out) from error
            raise

    def _acquire(self) -> bool:
        """Take the lock; returns whether the directory existed before."""
        while True:
            try:
                self.path.mkdir()
                existed = False
            except FileExistsError:
                existed = True
            try:
                lock = os.open(self.path / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            except FileNotFoundError:
                continue  # its owner finished between the two calls
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                current = os.stat(self.path / LOCK_NAME).st_ino == os.fstat(lock).st_ino
            except BlockingIOError:
                os.close(lock)
                raise TargetError(
                    f"{self.out}: another process is writing it; wait for it to end or choose another target"
                ) from None
            except FileNotFoundError:
                current = False
            if current:
                self._lock = lock
                return existed
            os.close(lock)  # the owner finished while we waited: this lock file is no longer the one

    def _recover(self) -> None:
        """Finish or undo a replacement that was interrupted between its two renames."""
        if self._old.is_dir() and not self._old.is_symlink():
            if self.out.exists():
                shutil.rmtree(self._old)
            else:
                self._old.rename(self.out)

    def commit(self) -> None:
        """Flush everything to the disk and rename it to `out`; an old `out` is removed only after that.

        Raises:
            TargetError: it could not be flushed or renamed; `out` is then what it was.
        """
        try:
            flush_tree(self.path)
            _check_existing(self.out, self._overwrite)
            if self.out.exists() and any(self.out.iterdir()):
                self.out.rename(self._old)
            try:
                self.path.rename(self.out)
            except BaseException:
                if self._old.exists():
                    self._old.rename(self.out)
                raise
            (self.out / LOCK_NAME).unlink()
            _flush(self.out)
            _flush(self.out.parent)
        except OSError as error:
            raise target_error(error, self.out) from error
        shutil.rmtree(self._old, ignore_errors=True)  # the new one is in place; the next run clears what remains
        self._parents = []
        self.release()

    def discard(self) -> None:
        """Remove the staging directory, and the parents made for it. Does nothing after `commit` or `release`."""
        if self._lock < 0:
            return
        try:
            self._clear()
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            self.path.rmdir()
        except OSError:
            pass  # another process may already have taken it over; what remains is cleared by the next run
        self.release()
        for parent in self._parents:
            try:
                parent.rmdir()
            except OSError:
                break

    def release(self) -> None:
        """Give up the lock and leave the directory as it is, for a later resume."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _clear(self) -> None:
        for entry in os.scandir(self.path):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path)
            elif entry.name != LOCK_NAME:
                os.unlink(entry.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Made before anything is removed: the message says how much space was free at the failure.
        mapped = self._mapped(value) if isinstance(value, OSError) else None
        if value is not None and self.keep:
            self.release()
        else:
            self.discard()
        if mapped is not None:
            raise mapped from value

    def _mapped(self, error: OSError) -> TargetError | None:
        """The TargetError for an error of writing; None when it came from reading the source."""
        name = error.filename
        inside = isinstance(name, str | os.PathLike) and Path(name).is_relative_to(self.path)
        return target_error(error, self.out) if inside or error.errno in _WRITE_ERRNOS else None


def _check_target(out: Path, source: Path | None) -> None:
    if not out.name or os.path.ismount(out):
        raise TargetError(f"{out}: this is a mount point, which cannot be replaced; choose a directory below it")
    if source is not None and source.exists() and Path(os.path.realpath(source)).is_relative_to(out):
        raise TargetError(f"{out}: the source lies here and must not be overwritten; choose another target")


def _check_existing(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise TargetError(f"{out}: found a file, needed a directory or a free name")
    names = os.listdir(out)
    if not names:
        return
    # A slip of the keyboard must not delete somebody's home directory: only what looks like a model is replaced.
    if not any(name == "config.json" or name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        raise TargetError(f"{out}: the directory is not empty and holds no model; choose another target")
    if not overwrite:
        raise TargetError(f"{out}: the directory exists and is not empty; choose another target or use --overwrite")


def _missing_parents(out: Path) -> list[Path]:
    """Parents of `out` that do not exist, the innermost first."""
    return [parent for parent in out.parents if not parent.exists()]


def _flush(path: Path | str) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_tree(root: Path) -> None:
    """Put every file and directory below `root`, and `root`, on the disk."""
    for directory, _, names in os.walk(root, topdown=False):
        for name in names:
            _flush(os.path.join(directory, name))
        _flush(directory)


def _free_text(path: Path) -> str:
    try:
        return f"found {size_text(free_bytes(path))} free"
    except OSError:
        return "and its free space cannot be read"
