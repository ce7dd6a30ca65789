"""The stages and tasks that are running, and how progress names them."""

from __future__ import annotations

import time
from collections.abc import Iterable, MutableSequence
from dataclasses import dataclass, field
from typing import TypeVar

REUSED = "reused from an earlier run"


@dataclass
class Running:
    """A stage or a task that is running.

    Attributes:
        title: its name.
        begin: when it began, in seconds of the monotonic clock.
        number, total: which of how many stages it is; both 0 for a task, and for a stage that is not counted.
        inner: seconds of the stages that ran within it, because it needs them.
    """

    title: str
    # Not the function itself: its name is looked up when a task begins.
    begin: float = field(default_factory=lambda: time.monotonic())
    number: int = 0
    total: int = 0
    inner: float = 0.0

    @property
    def heading(self) -> str:
        """The title, behind the number of a stage."""
        return stage_title(self.title, self.number, self.total)


R = TypeVar("R", bound=Running)


def leave(stages: MutableSequence[R], number: int) -> tuple[R, float]:
    """Remove the innermost of the running stages; return it, and the seconds that it took without inner stages."""
    done, now = stages.pop(), time.monotonic()
    rise(stages, number)
    if stages:
        stages[-1].inner += now - done.begin
    return done, now - done.begin - done.inner


def rise(stages: Iterable[Running], number: int) -> None:
    """Give the running stages a higher number than that of a stage that has ended."""
    for stage in stages:
        if stage.total:
            stage.number = max(stage.number, number + 1)


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
