"""A submitted sequence: what the caller holds to cancel it, and where the scheduler keeps its place."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

from cushion_deploy.serve.request import Delivery
from cushion_deploy.serve.sequence import Sequence

Deliver = Callable[[Delivery], None]
"""Receives the deliveries of a sequence, in the thread of the scheduler; must not block or raise."""


class Job:
    """One sequence of the scheduler.

    Args:
        key: names its row.
        sequence: what it generates.
        deliver: receives what it generates.
    """

    def __init__(self, key: int, sequence: Sequence, deliver: Deliver) -> None:
        self.key, self.sequence, self.deliver = key, sequence, deliver
        self.cancelled = self.opened = False
        self.submitted = monotonic()
        self.last_token = self.submitted
        timeout = sequence.request.timeout
        self.deadline = None if timeout is None else self.submitted + timeout
        self.fed = 0
        self.next_token: int | None = None

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is not fed yet."""
        return self.fed < len(self.sequence.request.prompt_ids)

    @property
    def computed(self) -> int:
        """Prompt tokens fed so far, without those that were in the cache."""
        return self.fed - self.sequence.cached_tokens

    def cancel(self) -> None:
        """Stop generating at the next step; may be called from any thread, also after the end."""
        self.cancelled = True
