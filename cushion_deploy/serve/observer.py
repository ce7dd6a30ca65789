"""What the scheduler reports about its work; an observer that records nothing."""

from __future__ import annotations

from cushion_deploy.serve.request import EndReason, SequenceUsage


class Observer:
    """Ignores every report. A subclass overrides what it records; methods run in the thread of the scheduler."""

    def admitted(self, seconds: float, usage: SequenceUsage) -> None:
        """Take note of a sequence that got a row after it had waited for ``seconds``."""

    def prefilled(self, tokens: int) -> None:
        """Take note of a chunk of a prompt of so many tokens."""

    def decoded(self, rows: int) -> None:
        """Take note of a decode step of so many rows."""

    def token(self, seconds: float, *, first: bool) -> None:
        """Take note of a token, so many seconds after the one before it or, the first, after the submission."""

    def finished(self, end: EndReason, seconds: float) -> None:
        """Take note of a sequence that ended so many seconds after its submission."""
