"""Progress on stderr: a live bar on a terminal, a line now and then in a log, nothing for short runs in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from qlf import output

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from qlformat.progress import Progress as Update

BAR_AFTER = 0.3
"""Seconds before a bar is drawn: drawing imports rich, and a run that is over by then needs none."""
LOG_EVERY = 10.0
"""Seconds between two lines in a log."""

Listener = Callable[["Update"], None]


@contextmanager
def progress(quiet: bool) -> Iterator[Listener | None]:
    """What to pass to the library as `progress` for as long as the block runs; None when nothing is to be shown."""
    drawn = not quiet and output.interactive(sys.stderr)
    if not drawn:  # read when huggingface_hub is imported, which happens only for a source on the Hub
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if quiet:
        yield None
        return
    view = Bar() if drawn else Log(sys.stderr)
    try:
        yield view.update
    finally:
        view.close()


class Log:
    """At most one line each `every` seconds.

    Args:
        stream: where to write.
        every: seconds between lines; the first comes after as many.
        clock: monotonic seconds.
    """

    def __init__(self, stream: TextIO, every: float = LOG_EVERY, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._every, self._clock = stream, every, clock
        self._last = clock()
        self._phase = ""
        self._start = (self._last, 0)
        self._spoken = False

    def update(self, now: Update) -> None:
        """Take a report of the library."""
        if not now.phase:
            return
        moment = self._clock()
        if now.phase != self._phase:
            self._phase, self._start = now.phase, (moment, now.bytes_done)
        if moment - self._last < self._every:
            return
        self._last = moment
        if not self._spoken:
            self._spoken = True
            note = _slow()
            if note:
                self._stream.write(note + "\n")
        self._stream.write(self._text(now, moment) + "\n")
        self._stream.flush()

    def _text(self, now: Update, moment: float) -> str:
        # What a resumed run found already done says nothing about its speed.
        since, before = self._start
        took, done = moment - since, now.bytes_done - before
        parts = [f"{now.tensors_done}/{now.tensors_total} {now.unit}", output.share(now.bytes_done, now.bytes_total)]
        if done > 0 and took > 0:
            parts += [output.speed(done, took), _left((now.bytes_total - now.bytes_done) * took / done)]
        return f"qlf: {output.clean(now.phase)}: {', '.join(parts)}"

    def close(self) -> None:
        """Nothing to put away."""


class Bar:
    """A bar with tensors done, GB/s and the time left. It vanishes at the end: the report takes its place."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._drawn: Progress | None = None
        self._task: TaskID | None = None
        self._phase = ""

    def update(self, now: Update) -> None:
        """Take a report of the library."""
        if not now.phase:
            self.close()
            return
        if self._drawn is None:
            if time.monotonic() - self._begun < BAR_AFTER:
                return
            self._drawn = _rich_bar()
            note = _slow()
            if note:
                sys.stderr.write(note + "\n")
            self._drawn.start()
        total = now.bytes_total or None
        tensors = f"{now.tensors_done}/{now.tensors_total} {now.unit}"
        if self._task is None or now.phase != self._phase:
            if self._task is not None:
                self._drawn.remove_task(self._task)
            self._phase = now.phase
            name = output.clean(now.phase)
            self._task = self._drawn.add_task(name, total=total, completed=now.bytes_done, tensors=tensors)
        self._drawn.update(self._task, total=total, completed=now.bytes_done, tensors=tensors)

    def close(self) -> None:
        """Erase the bar and give the cursor back."""
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = self._task = None


def _rich_bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn
    from rich.text import Text

    class Pace(ProgressColumn):
        """Speed and time left, once they are known."""

        def render(self, task: Task) -> Text:
            left = task.time_remaining
            if not task.speed or not left:
                return Text()
            return Text(f"{output.speed(round(task.speed), 1)}, {_left(left)}")

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(complete_style="cyan", finished_style="cyan"),
        TaskProgressColumn(text_format="{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[tensors]}"),
        Pace(),
        console=Console(stderr=True),
        transient=True,
    )


def _left(seconds: float) -> str:
    """Time left, without digits that would flicker."""
    return f"{seconds:.0f} s left" if seconds < 59.5 else f"{output.seconds(seconds)} left"


def _slow() -> str | None:
    """What to say when the native kernels are missing: the result is the same, and takes far longer."""
    from qlformat import native

    if native.available():
        return None
    return f"qlf: note: the slow reference code is used: {output.clean(native.why_unavailable())}"
