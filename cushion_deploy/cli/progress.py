"""Progress on stderr: one live line for each stage in a terminal, a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cushion_deploy.core.progress import Progress, StageWatcher, Unwatched

LINE_SECONDS = 10.0
"""Longest silence where stderr is not a terminal, whatever is reported."""
REUSED = "reused from an earlier run"
BEAT_SECONDS = 0.25
"""Seconds between two looks at how long nothing was printed."""


class Display(Progress, StageWatcher, Protocol):
    """Displays the reports of tasks and the beginning and end of stages."""


@contextmanager
def progress(quiet: bool = False) -> Iterator[Display]:
    """Yield what displays the progress that it receives."""
    if quiet:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield _BarReport(bars)
    else:
        lines, over = _LineReport(), threading.Event()

        def beat() -> None:
            while not over.wait(BEAT_SECONDS):
                lines.beat()

        beating = threading.Thread(target=beat, daemon=True)
        beating.start()
        try:
            yield lines
        finally:
            over.set()
            beating.join()


def stage_title(stage: str, number: int, total: int) -> str:
    """Return ``[4/13] search``, or ``search`` for a stage that is not counted."""
    return f"[{number}/{total}] {stage}" if total else stage


def clock(seconds: float) -> str:
    """Return ``7 s``, ``2 min 05 s`` or ``1 h 02 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


class _Silent(Unwatched):
    """Displays nothing."""

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        """Discard the report."""


@dataclass
class _Running:
    """A stage or a task that is running."""

    title: str
    # Not the function itself: its name is looked up when a task begins.
    begin: float = field(default_factory=lambda: time.monotonic())


@dataclass
class _Task(_Running):
    """A task, and its last report; a ``total`` of 0 is an unknown one."""

    done: int = 0
    total: int = 0
    timed: bool = False
    note: str = ""

    def words(self, now: float) -> str:
        """Return what is done, at which rate, and how long the rest will take."""
        if self.timed:
            return f"{self.title}: {clock(self.done)}"
        rate = self.done / max(now - self.begin, 1e-9)
        left = f", {clock((self.total - self.done) / rate)} left" if rate and self.done < self.total else ""
        rates = f" ({rate:.1f}/s{left})" if rate else ""
        return f"{self.title}: {self.done}/{self.total}{rates}" + (f"; {self.note}" if self.note else "")


class _LineReport:
    """Prints a line at the end of a stage, and one whenever nothing was printed for :data:`LINE_SECONDS`.

    Outside of stages, as in commands that run none, the end of a task is also a line.
    """

    def __init__(self) -> None:
        self.stages: list[_Running] = []
        self.task: _Task | None = None
        self.last = time.monotonic()
        # Reports come from several threads.
        self.lock = threading.RLock()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        with self.lock:
            if self.task is None or self.task.title != task:
                self.task = _Task(task, timed=not total)
            self.task.done, self.task.total, self.task.note = done, total, note
            over = bool(total) and done >= total
            if over and not self.stages:
                self._print(self.task.words(time.monotonic()))
                self.task = None
            else:
                self.beat()

    def begin(self, stage: str, number: int, total: int) -> None:
        with self.lock:
            self.stages.append(_Running(stage_title(stage, number, total)))
            self.task = None

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        with self.lock:
            if not reused:
                taken = time.monotonic() - self.stages.pop().begin
                self.task = None
                self._print(f"{stage_title(stage, number, total)}: done in {clock(taken)}")
            elif total:
                self._print(f"{stage_title(stage, number, total)}: {REUSED}")

    def stop(self) -> None:
        with self.lock:
            self.stages.pop()
            self.task = None

    def beat(self) -> None:
        """Print where the work is if nothing was printed for too long."""
        with self.lock:
            now = time.monotonic()
            if now - self.last < LINE_SECONDS or not (self.stages or self.task):
                return
            words = self.task.words(now) if self.task else ""
            if self.stages:
                stage = self.stages[-1]
                words = ": ".join(filter(None, (f"{stage.title}, {clock(now - stage.begin)}", words)))
            self._print(words)

    def _print(self, line: str) -> None:
        self.last = time.monotonic()
        print(line, file=sys.stderr, flush=True)


class _CountColumn(MofNCompleteColumn):
    """Units done and total units; nothing if the length is unknown."""

    def render(self, task: Task) -> Text:
        """Return the count of a task."""
        return Text("") if task.total is None else super().render(task)


class _LeftColumn(ProgressColumn):
    """What a task still takes at its present rate."""

    def render(self, task: Task) -> Text:
        """Return the time left."""
        left = task.time_remaining
        return Text("" if left is None or task.finished else f"{clock(left)} left", style="progress.remaining")


class _ElapsedColumn(ProgressColumn):
    """How long a line has been there: the time of a stage, not that of its present task."""

    def render(self, task: Task) -> Text:
        """Return the time since the line began."""
        return Text(clock(time.monotonic() - task.fields["begin"]), style="progress.elapsed")


def _bars() -> Bars:
    return Bars(
        TextColumn("{task.description}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=10),
        _CountColumn(),
        _LeftColumn(),
        _ElapsedColumn(),
        console=Console(stderr=True),
        expand=True,
    )


@dataclass(kw_only=True)
class _Line(_Running):
    """A live line: a stage, or a task outside of stages; ``task`` is what it is at."""

    row: TaskID
    task: str = ""


class _BarReport:
    """Shows one live line for the running stage; what has ended stays above it as a plain line."""

    def __init__(self, bars: Bars) -> None:
        self.bars = bars
        self.stages: list[_Line] = []
        self.task: _Line | None = None
        self.lock = threading.RLock()

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        with self.lock:
            if not self.stages and (self.task is None or self.task.title != task):
                self._drop_task()
                self.task = self._line(task)
            line = self.stages[-1] if self.stages else self.task
            if line is None:
                return
            words = f"{line.title}: {task}" if self.stages else task
            text = f"{words}: {note}" if note else words
            if line.task != task:
                line.task = task
                self.bars.reset(line.row, total=total or None, completed=done, description=text)
            # A task of unknown length has an animated bar, and its seconds are those of the line.
            timed = not total
            self.bars.update(line.row, completed=0 if timed else done, total=total or None, description=text)
            if total and done >= total and not self.stages:
                self._drop_task()
                self._print(f"{task}: {done}/{total}" + (f"; {note}" if note else ""))

    def begin(self, stage: str, number: int, total: int) -> None:
        with self.lock:
            self._drop_task()
            self.stages.append(self._line(stage_title(stage, number, total)))

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        with self.lock:
            if not reused:
                line = self.stages.pop()
                self.bars.remove_task(line.row)
                self._print(f"{stage_title(stage, number, total)}: done in {clock(time.monotonic() - line.begin)}")
            elif total:
                self._print(f"{stage_title(stage, number, total)}: {REUSED}")

    def stop(self) -> None:
        with self.lock:
            self.bars.remove_task(self.stages.pop().row)

    def _line(self, title: str) -> _Line:
        return _Line(title, row=self.bars.add_task(title, total=None, begin=time.monotonic()))

    def _drop_task(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task.row)
            self.task = None

    def _print(self, line: str) -> None:
        self.bars.console.print(line, markup=False, highlight=False)
