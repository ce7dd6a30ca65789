"""How long-running work reports progress; the command line displays it, tests record it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

TICK_SECONDS = 1.0
"""Seconds between two reports of a step of unknown length."""


class Progress(Protocol):
    """Called with the name of a task, the units done and the total number of units; once with done == total.

    A total of 0 means that the length is unknown; the units are then seconds since the start of the task. ``note`` is
    an intermediate result, such as a loss; it may change between reports, the name must not. A task that has ended does
    not begin again in the same stage: every task has a name of its own.
    """

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Receive one report."""
        ...


class StageWatcher(Protocol):
    """Told which stage of a pipeline is running; the reports of :class:`Progress` in between belong to it.

    A stage may begin while another one runs, which needs it; it also ends first.
    """

    def begin(self, stage: str, number: int, total: int) -> None:
        """A stage begins: its label, and which of how many it is; both 0 if they are not counted.

        Stages are numbered in the order in which they end, so one that waits for another still rises.
        """
        ...

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        """A stage is done; one that is ``reused`` has not begun in this run."""
        ...

    def stop(self) -> None:
        """The running stage ends without a result."""
        ...


class Unwatched:
    """A watcher that ignores everything."""

    def begin(self, stage: str, number: int, total: int) -> None:
        """Ignore it."""

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        """Ignore it."""

    def stop(self) -> None:
        """Ignore it."""


def silent(task: str, done: int, total: int, note: str = "") -> None:
    """Discard the report."""


def titled(progress: Progress, title: str) -> Progress:
    """Return a receiver that puts a title before the name of every task, for work that is done more than once."""
    return lambda task, done, total, note="": progress(f"{title}: {task}", done, total, note)


@contextmanager
def elapsed(progress: Progress, task: str) -> Iterator[None]:
    """Report that a step of unknown length begins and, from a thread, the seconds that it has taken until it ends."""
    begin, over = time.monotonic(), threading.Event()
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while not over.wait(TICK_SECONDS):
            ticks += 1
            progress(task, int(time.monotonic() - begin), 0)

    progress(task, 0, 0)
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
