"""Progress of training on stderr: one bar with loss, tokens/s and time left, or a line now and then in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qlf import output
from qlf.progress import LOG_EVERY

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from qlformat.finetune.metrics import TrainingProgress

Listener = Callable[["TrainingProgress"], None]


@contextmanager
def training_progress(quiet: bool) -> Iterator[Listener | None]:
    """What to pass to `finetune` as `progress` for as long as the block runs; None when nothing is to be shown."""
    if quiet:
        yield None
        return
    view = TrainingBar() if output.interactive(sys.stderr) else TrainingLog(sys.stderr)
    try:
        yield view.update
    finally:
        view.close()


def describe(now: TrainingProgress) -> str:
    """Loss, speed and time left, as far as they are known."""
    parts = [] if now.loss is None else [f"loss {now.loss:.4f}"]
    if now.tokens_per_second:
        parts.append(f"{now.tokens_per_second:.0f} tokens/s")
    if now.seconds_left:
        parts.append(f"{output.seconds(now.seconds_left)} left")
    return ", ".join(parts)


class TrainingLog:
    """At most one line each `every` seconds."""

    def __init__(self, stream: TextIO, every: float = LOG_EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._last = clock()

    def update(self, now: TrainingProgress) -> None:
        """Take a report of the library."""
        moment = self._clock()
        if moment - self._last < self._every:
            return
        self._last = moment
        steps = f"step {now.step}/{now.steps}" if now.steps else ""
        text = ", ".join(part for part in (steps, describe(now)) if part)
        self._stream.write(f"qlf: {now.phase}{': ' if text else ''}{text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to put away."""


class TrainingBar:
    """A bar that vanishes at the end: the report takes its place."""

    def __init__(self) -> None:
        self._drawn: Progress | None = None
        self._task: TaskID | None = None

    def update(self, now: TrainingProgress) -> None:
        """Take a report of the library."""
        if self._drawn is None:
            self._drawn = _rich_bar()
            self._drawn.start()
            self._task = self._drawn.add_task(now.phase, total=None, steps="", facts="")
        if self._task is not None:
            steps = f"{now.step}/{now.steps}" if now.steps else ""
            self._drawn.update(
                self._task, description=now.phase, total=now.steps or None, completed=now.step, steps=steps,
                facts=describe(now),
            )  # fmt: skip

    def close(self) -> None:
        """Erase the bar and give the cursor back."""
        if self._drawn is not None:
            self._drawn.stop()


def _rich_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan"),
        TextColumn("{task.fields[steps]}"),
        TextColumn("{task.fields[facts]}"),
        console=Console(stderr=True),
        transient=True,
    )
