"""Progress in a terminal: one live line for the running stage, and a plain line for each that has ended."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

from cushion_deploy.cli.running import REUSED, Running, clock, leave, rise, stage_title


@contextmanager
def live_lines(command: str) -> Iterator[_BarReport]:
    """Yield what displays the progress of a command in a terminal, on stderr."""
    with _bars() as live:
        yield _BarReport(live, command)


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
class _Line(Running):
    """A live line: a stage, or a task outside of stages; ``task`` is what it is at."""

    row: TaskID
    task: str = ""


class _BarReport:
    """Shows one live line for the running stage; what has ended stays above it as a plain line."""

    def __init__(self, live: Bars, command: str) -> None:
        self.live = live
        self.stages: list[_Line] = []
        self.task: _Line | None = None
        self.lock = threading.RLock()
        # Shown where no stage and no task runs, such as while libraries are imported.
        self.whole: _Line | None = None
        self.whole = self._line(command)

    def __call__(self, task: str, done: int, total: int, note: str = "") -> None:
        with self.lock:
            if not self.stages and (self.task is None or self.task.title != task):
                self._drop_task()
                self.task = self._line(task)
            line = self.stages[-1] if self.stages else self.task
            if line is None:
                return
            words = f"{line.heading}: {task}" if self.stages else task
            text = f"{words}: {note}" if note else words
            if line.task != task:
                line.task = task
                self.live.reset(line.row, total=total or None, completed=done, description=text)
            # A task of unknown length has an animated bar, and its seconds are those of the line.
            timed = not total
            self.live.update(line.row, completed=0 if timed else done, total=total or None, description=text)
            if total and done >= total and not self.stages:
                self._drop_task()
                self._print(f"{task}: {done}/{total}" + (f"; {note}" if note else ""))

    def begin(self, stage: str, number: int, total: int) -> None:
        with self.lock:
            self._drop_task()
            self.stages.append(self._line(stage, number, total))

    def end(self, stage: str, number: int, total: int, *, reused: bool) -> None:
        with self.lock:
            if not reused:
                line, seconds = leave(self.stages, number)
                self._remove(line)
                self._print(f"{stage_title(stage, number, total)}: done in {clock(seconds)}")
                return
            rise(self.stages, number)
            if total:
                self._print(f"{stage_title(stage, number, total)}: {REUSED}")

    def stop(self) -> None:
        with self.lock:
            self._remove(self.stages.pop())

    def _line(self, title: str, number: int = 0, total: int = 0) -> _Line:
        shown = stage_title(title, number, total)
        row = self.live.add_task(shown, total=None, begin=time.monotonic())
        self._show_whole(False)
        return _Line(title, number=number, total=total, row=row)

    def _remove(self, line: _Line) -> None:
        self.live.remove_task(line.row)
        self._show_whole(not self.stages and self.task is None)

    def _show_whole(self, visible: bool) -> None:
        if self.whole is not None:
            self.live.update(self.whole.row, visible=visible)

    def _drop_task(self) -> None:
        if self.task is not None:
            line, self.task = self.task, None
            self._remove(line)

    def _print(self, line: str) -> None:
        self.live.console.print(line, markup=False, highlight=False)
