"""How long-running work tells where it stands; the command line draws it, tests record it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the name of a task, the units done and the units in all; also once with done == total."""

    def __call__(self, task: str, done: int, total: int) -> None:
        """Take one report."""
        ...


def silent(task: str, done: int, total: int) -> None:
    """Report nothing."""
