"""Errors of qlformat. `str(error)` is always one line: what was found, what was needed, what to do."""

from __future__ import annotations


def shown(value: object) -> str:
    """repr of a value found in an untrusted file, cut to a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class QlfError(Exception):
    """Base of every error that qlformat raises on purpose.

    Args:
        message: one line without a trailing period of its own context (no file or tensor name in front).
        rule: id of the violated rule of spec/format.md ("T4"), or None when the format is not concerned.
        tensor: name of the tensor concerned, or None.
        file: name of the file concerned, or None.
    """

    def __init__(
        self, message: str, *, rule: str | None = None, tensor: str | None = None, file: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.rule = rule
        self.tensor = tensor
        self.file = file

    def __str__(self) -> str:
        where = [self.file] if self.file else []
        if self.tensor:
            where.append(f"tensor {self.tensor!r}")
        prefix = f"[{self.rule}] " if self.rule else ""
        text = prefix + (": ".join([*where, self.message]) if where else self.message)
        # Names come from untrusted files: a control character must not break the one-line promise or the terminal.
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class FormatError(QlfError):
    """A file or checkpoint violates a rule of the format; `rule` is always set."""


class SourceError(QlfError):
    """The 16- or 32-bit source cannot be read or must not be quantized."""


class TargetError(QlfError):
    """The output cannot be written: it exists, the disk is full, or it is not permitted."""


class PinError(QlfError):
    """An adapter belongs to another base than the one it is to be used on."""


class NativeError(QlfError):
    """The native kernels are missing or refused their arguments."""
