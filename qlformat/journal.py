"""The journal of a conversion: what is finished in a staging directory, for --resume after any interruption."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

from qlformat.errors import TargetError

FILE_NAME = ".qlf-journal.jsonl"


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """What was written for one weight.

    Attributes:
        name: name of the weight.
        sha256: stored tensor -> sha256 of its bytes, or the checksum of a result without a manifest.
        quant_state: text of the quant_state JSON, or None for a weight that is not quantized.
        squared_error, signal: squared error and squared norm of the weight (reference.squared_error).
    """

    name: str
    sha256: dict[str, str] = field(default_factory=dict)
    quant_state: str | None = None
    squared_error: float = 0.0
    signal: float = 0.0


class Journal:
    """Lines of finished weights. The first line names the plan, so that another plan's work is never taken over.

    A line is added after the bytes of its weight were handed to the operating system; on resume they are hashed
    again, so neither a torn line nor bytes lost in a power failure are taken for finished work.

    Raises:
        TargetError: the journal belongs to another plan.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self.path = directory / FILE_NAME
        self._lock = threading.Lock()
        self.done = self._load(key)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._fd = os.open(self.path, flags | (0 if self.done else os.O_TRUNC), 0o644)
        if not self.done:
            self._append({"plan": key})
        else:
            os.write(self._fd, b"\n")  # ends a line that may be torn

    def add(self, weight: StoredWeight) -> None:
        """Record a finished weight."""
        with self._lock:
            self._append(asdict(weight))

    def close(self) -> None:
        """Close the file and keep it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Delete the journal: the conversion is complete."""
        self.close()
        self.path.unlink()

    def _append(self, entry: dict[str, object]) -> None:
        os.write(self._fd, json.dumps(entry).encode() + b"\n")

    def _load(self, key: str) -> dict[str, StoredWeight]:
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return {}
        entries = []
        for line in lines:
            try:
                entries.append(json.loads(line))
            except ValueError:
                continue  # torn by the interruption
        if not entries:
            return {}
        if entries[0].get("plan") != key:
            raise TargetError(
                "the interrupted conversion had another source or other options; run again without --resume"
            )
        return {entry["name"]: StoredWeight(**entry) for entry in entries[1:]}
