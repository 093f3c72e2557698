"""Progress of a long operation, reported to a callback at most twenty times a second."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_INTERVAL_SECONDS = 0.05


@dataclass(frozen=True)
class Progress:
    """How far an operation is.

    Attributes:
        phase: what is being done, in one or two words; empty where another program shows its own progress.
        tensors_done, tensors_total: weights, or what `unit` says.
        bytes_done, bytes_total: bytes read.
        unit: what is counted.
    """

    phase: str
    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int
    unit: str = "tensors"


HIDDEN = Progress("", 0, 0, 0, 0)


class ProgressMeter:
    """Counts for several threads and calls back under a lock."""

    def __init__(
        self,
        callback: Callable[[Progress], None] | None,
        tensors_total: int,
        bytes_total: int,
        phase: str = "converting",
        unit: str = "tensors",
    ) -> None:
        self._callback = callback
        self._totals = (tensors_total, bytes_total)
        self._done = [0, 0]
        self._phase = phase
        self._unit = unit
        self._last = 0.0
        self._lock = threading.Lock()

    def add(self, nbytes: int = 0, tensors: int = 0) -> None:
        """Count work that is done."""
        with self._lock:
            self._done[0] += tensors
            self._done[1] += nbytes
            finished = self._done[0] == self._totals[0]
            if self._callback and (finished or time.monotonic() - self._last >= _INTERVAL_SECONDS):
                self._report()

    def enter(self, phase: str) -> None:
        """Name the phase that begins."""
        with self._lock:
            self._phase = phase
            self._report()

    def _report(self) -> None:
        self._last = time.monotonic()
        if self._callback:
            tensors, nbytes = self._totals
            self._callback(Progress(self._phase, self._done[0], tensors, self._done[1], nbytes, self._unit))
