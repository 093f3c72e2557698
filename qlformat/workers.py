"""Tasks on a few threads, which give up together when one of them fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait


class Stopped(Exception):
    """A task gave up, because another one failed or somebody asked for it; what is done is of no use."""


def run_all(tasks: Iterable[Callable[[], object]], threads: int, stop: threading.Event) -> None:
    """Run tasks, wait for all of them, and raise the first error that is not Stopped.

    Args:
        tasks: begun in this order.
        threads: how many run at once.
        stop: set after an error or an interruption by the user, or by another thread; tasks look at it and give up by
            raising Stopped, those not begun are dropped.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix="qlf") as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for error in [future.exception() for future in futures if future in done]:
                if error is not None and not isinstance(error, Stopped):
                    raise error
        except BaseException:  # Ctrl-C too
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
