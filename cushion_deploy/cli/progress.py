"""Progress on stderr: bars with rate and remaining time in a terminal, occasional plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cushion_deploy.core.progress import Progress as Report
from cushion_deploy.core.progress import silent

LINE_SECONDS = 20.0
"""Seconds between two lines if stderr is not a terminal."""


class RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        """Return the rate of a task."""
        if task.fields.get("timed"):
            return Text("")
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.1f}/s", style="dim")


class CountColumn(MofNCompleteColumn):
    """Units done and total units; seconds if the length is unknown."""

    def render(self, task: Task) -> Text:
        """Return the count of a task."""
        if task.fields.get("timed"):
            return Text(f"{int(task.completed)} s", style="progress.download")
        return super().render(task)


@contextmanager
def progress(quiet: bool = False) -> Iterator[Report]:
    """Yield a function that displays the progress it receives."""
    if quiet:
        yield silent
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _BarReport(bars)
    else:
        yield _LineReport()


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description:<36}"),
        BarColumn(bar_width=24),
        CountColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


class _BarReport:
    """Shows one bar at a time; finished bars remain visible."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        known = self.tasks.get(task)
        if known is None:
            # Without a total the bar is animated.
            known = self.tasks[task] = self.bars.add_task(task, total=total or None, timed=not total)
        text = f"{task}: {note}" if note else task
        self.bars.update(known, completed=done, total=total or None, description=text)
        if total and done >= total:
            del self.tasks[task]


class _LineReport:
    """Prints a line at intervals, and one at the end of a task."""

    def __init__(self) -> None:
        self.task, self.begin, self.last, self.timed = "", 0.0, 0.0, False

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if task != self.task:
            self.task, self.begin, self.last, self.timed = task, now, now, not total
            return
        over = bool(total) and done >= total
        if not over and now - self.last < LINE_SECONDS:
            return
        self.last = now
        rate = done / max(now - self.begin, 1e-9)
        left = f", {(total - done) / rate:.0f} s left" if done < total and rate else ""
        count = f"{done} s" if self.timed else f"{done}/{total} ({rate:.1f}/s{left})"
        print(f"{task}: {count}" + (f"; {note}" if note else ""), file=sys.stderr, flush=True)
        if over:
            self.task = ""
