"""Progress on stderr: one live line for each stage in a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import click

from cushion_deploy.cli.progress_bars import live_lines
from cushion_deploy.cli.running import REUSED, Running, clock, leave, rise, stage_title
from cushion_deploy.core.progress import Progress, StageWatcher, Unwatched

LINE_SECONDS = 10.0
"""Longest silence where stderr is not a terminal, whatever is reported."""
SLOWEST_RATE = 0.1
"""Units per second; below it, the seconds of a unit are shown."""
SHORTEST_SECONDS = 0.1
"""Tasks that took less have no rate."""
BEAT_SECONDS = 0.25
"""Seconds between two looks at how long nothing was printed."""


class Display(Progress, StageWatcher, Protocol):
    """Displays the reports of tasks and the beginning and end of stages."""


@contextmanager
def progress(quiet: bool = False, *, at_once: bool = False) -> Iterator[Display]:
    """Yield what displays the progress that it receives.

    Args:
        quiet: display nothing.
        at_once: where stderr is no terminal, print a line when a task begins, too.
    """
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with live_lines(_command()) as lines:
            yield lines
    else:
        report, over = _LineReport(_command(), at_once), threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                report.beat()

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield report
        finally:
            over.set()
            beating.join()


def _command() -> str:
    """Return the name of the running command, which says what runs where no stage and no task does."""
    context = click.get_current_context(silent=True)
    return str(context.info_name) if context else "working"


class _Silent(Unwatched):
    """Displays nothing."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Discard the report."""


@dataclass
class _Task(Running):
    """A task, and its last report; a ``total`` of 0 is unknown, ``ended`` when it was last known to be done."""

    done: int = 0
    total: int = 0
    timed: bool = False
    note: str = ""
    ended: float = math.inf

    def words(self, now: float) -> str:
        """Return what is done, at which rate, and how long the rest will take."""
        if now - self.ended >= LINE_SECONDS:
            return f"after {self.title}"
        if self.timed:
            return f"{self.title}: {clock(self.done)}"
        seconds = now - self.begin
        rate = self.done / seconds if seconds >= SHORTEST_SECONDS else 0.0
        left = f", {clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        pace = f"{rate:.1f}/s" if rate >= SLOWEST_RATE else f"{clock(1 / rate)} each" if rate else ""
        rates = f" ({pace}{left})" if pace else ""
        return f"{self.title}: {self.done}/{self.total}{rates}" + (f"; {self.note}" if self.note else "")


class _LineReport:
    """Prints a line at the end of a stage, and one whenever nothing was printed for :data:`LINE_SECONDS`.

    Outside of stages, as in commands that run none, the end of a task is also a line.
    """

    def __init__(self, command: str, at_once: bool = False) -> None:
        self.at_once = at_once
        self.whole = Running(command)
        self.stages: list[Running] = []
        self.task: _Task | None = None
        self.last = time.monotonic()
        # Reports come from several threads.
        self.lock = threading.RLock()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        with self.lock:
            if self.task is None or self.task.title != task:
                self.task = _Task(task, timed=not total)
                if self.at_once:
                    self._print(task)
            self.task.done, self.task.total, self.task.note = done, total, note
            over = bool(total) and done >= total
            # A task of unknown length reports every second until it ends.
            if over or self.task.timed:
                self.task.ended = time.monotonic()
            if over and not self.stages:
                self._print(self.task.words(time.monotonic()))
                self.task = None
            else:
                self.beat()

    def begin(self, stage: str, number: int, total: int) -> None:
        with self.lock:
            self.stages.append(Running(stage, number=number, total=total))
            self.task = None

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        with self.lock:
            if not reused:
                _, seconds = leave(self.stages, number)
                self.task = None
                self._print(f"{stage_title(stage, number, total)}: done in {clock(seconds)}")
                return
            rise(self.stages, number)
            if total:
                self._print(f"{stage_title(stage, number, total)}: {REUSED}")

    def stop(self) -> None:
        with self.lock:
            self.stages.pop()
            self.task = None

    def beat(self) -> None:
        """Print where the work is if nothing was printed for too long."""
        with self.lock:
            now = time.monotonic()
            if now - self.last < LINE_SECONDS:
                return
            words = self.task.words(now) if self.task else ""
            if self.stages or not words:
                stage = self.stages[-1] if self.stages else self.whole
                words = ": ".join(filter(None, (f"{stage.heading}, {clock(now - stage.begin - stage.inner)}", words)))
            self._print(words)

    def _print(self, line: str) -> None:
        self.last = time.monotonic()
        print(line, file=sys.stderr, flush=True)
