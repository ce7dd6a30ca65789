"""How long-running work reports progress; the command line displays it, tests record it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

TICK_SECONDS = 1.0
"""Seconds between two reports of a step of unknown length; a shorter step reports nothing."""


class Progress(Protocol):
    """Called with the name of a task, the units done and the total number of units; once with done == total.

    A total of 0 means that the length is unknown; the units are then seconds since the start of the task. ``note`` is
    an intermediate result, such as a loss; it may change between reports, the name must not.
    """

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Receive one report."""
        ...


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """Discard the report."""


@contextmanager
def elapsed(progress: Progress, task: str) -> Iterator[None]:
    """Report the elapsed seconds of a step of unknown length, from a thread, until it ends."""
    begin, over = time.monotonic(), threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not over.wait(TICK_SECONDS):
            ticks += 1
            progress(task, int(time.monotonic() - begin), 0)

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
    if ticks:
        seconds = max(1, round(time.monotonic() - begin))
        progress(task, seconds, seconds)
