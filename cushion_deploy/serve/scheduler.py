"""Continuous batching: a queue of sequences, prefill in chunks, and one decode step of all running rows in turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from time import monotonic

import numpy as np
from tokenizers import Tokenizer

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import CheckFailed, CushionError, UsageError
from cushion_deploy.serve.job import Deliver, Job
from cushion_deploy.serve.observer import Observer
from cushion_deploy.serve.request import Delivery, EndReason, SequenceRequest
from cushion_deploy.serve.rows import Rows
from cushion_deploy.serve.sequence import Sequence

SMALLEST_CALL = 32
"""Tokens that a short call counts as: SmolLM2 takes as long for 1 token as for 16, a third of the time for 128."""
_LOG = logging.getLogger(__name__)


class Refused(CushionError):
    """The scheduler takes no more sequences: its queue is full, or the server shuts down."""

    def __init__(self, message: str, *, hint: str, retry: bool) -> None:
        super().__init__(message, hint=hint)
        self.retry = retry


@dataclass(frozen=True)
class Limits:
    """Limits of the scheduler.

    Attributes:
        queue: most sequences that wait for a row.
        chunk: most prompt tokens between two decode steps, where each call counts as at least :data:`SMALLEST_CALL`.
    """

    queue: int = 64
    chunk: int = 128


class Scheduler:
    """Runs sequences on rows of one session. :meth:`submit` is for any thread, :meth:`step` for one thread.

    Args:
        rows: rows of the session.
        tokenizer: tokenizer of the model.
        stop_ids: tokens that end a sequence.
        limits: queue and chunk.
        observer: is told what happens, for metrics.
    """

    def __init__(
        self,
        rows: Rows,
        tokenizer: Tokenizer,
        stop_ids: frozenset[int],
        limits: Limits | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Start idle."""
        self.rows, self.limits = rows, limits or Limits()
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._observer = observer or Observer()
        self._waiting: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._next_key = 0
        self._draining = False
        self._drain_until: float | None = None

    @property
    def waiting(self) -> int:
        """Sequences that wait for a row."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have a row."""
        return len(self._running)

    @property
    def draining(self) -> bool:
        """Whether no more sequences are taken."""
        return self._draining

    def submit(self, requests: list[SequenceRequest], deliver: Callable[[int, Delivery], None]) -> list[Job]:
        """Queue sequences, all or none, and return their jobs in order.

        Args:
            requests: the sequences.
            deliver: receives the index of a sequence in ``requests`` and what it delivers.

        Raises:
            Refused: the queue is full, or the server shuts down.
            UsageError: a stop string is empty, or there are more sequences than the queue takes.
        """
        sequences = [Sequence(request, self._tokenizer, self._stop_ids) for request in requests]
        with self._changed:
            if self._draining:
                raise Refused("the server is shutting down", hint="ask another server", retry=False)
            if len(requests) > self.limits.queue:
                raise UsageError(
                    f"{len(requests)} sequences are asked for at once, the queue takes {self.limits.queue}",
                    hint="ask for fewer prompts or choices, or start the server with a longer --queue",
                )
            if len(self._waiting) + len(requests) > self.limits.queue:
                raise Refused(
                    f"{len(self._waiting)} sequences are waiting, at most {self.limits.queue} may",
                    hint="try again later, or start the server with a longer --queue",
                    retry=True,
                )
            jobs = []
            for index, sequence in enumerate(sequences):
                jobs.append(Job(self._next_key, sequence, _bound(deliver, index)))
                self._next_key += 1
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def drain(self, seconds: float) -> None:
        """Take no more sequences, and cut off those that have not ended after ``seconds``."""
        with self._changed:
            self._draining = True
            self._drain_until = monotonic() + seconds
            self._changed.notify()

    def wait(self, seconds: float) -> bool:
        """Wait until there is work, at most for ``seconds``; return whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._waiting or self._running), seconds)

    def step(self) -> bool:
        """Drop what has ended, admit what fits, feed one chunk of prompts and one token of each row behind its prompt.

        Returns:
            Whether any sequence is left.
        """
        self._drop_ended()
        self._admit()
        self._feed_prompts()
        decoding = [job for job in self._running if job.next_token is not None]
        if decoding:
            self._guarded(decoding, lambda: self._decode(decoding))
        return bool(self._waiting or self._running)

    def abandon(self) -> None:
        """End every sequence with an error and take no more, because nobody calls :meth:`step` again."""
        self.drain(0)
        error = CheckFailed("the engine has stopped", hint="see the log of the server, and start it again")
        with self._changed:
            jobs = [*self._running, *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for job in jobs:
            job.deliver(Delivery(end="error", usage=job.sequence.usage, error=error))

    def _drop_ended(self) -> None:
        now = monotonic()
        expired = self._drain_until is not None and now >= self._drain_until
        with self._changed:
            jobs = [*self._running, *self._waiting]
        for job in jobs:
            end: EndReason | None = None
            if job.cancelled:
                end = "cancelled"
            elif expired:
                end = "shutdown"
            elif job.deadline is not None and now >= job.deadline:
                end = "timeout"
            if end is not None:
                self._finish(job, job.sequence.cut_off(end))

    def _admit(self) -> None:
        while len(self._running) < self.rows.capacity:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._running.append(job)

    def _open(self, job: Job) -> None:
        job.opened = True
        job.fed = job.sequence.cached_tokens = self.rows.open(job.key, job.sequence.request.prompt_ids)
        self._observer.admitted(monotonic() - job.submitted, job.sequence.usage)

    def _feed_prompts(self) -> None:
        """Feed prompts, the oldest first, until a chunk is full: several short ones, or a part of a long one."""
        left = self.limits.chunk
        while left >= min(SMALLEST_CALL, self.limits.chunk):
            job = next((job for job in self._running if job.prefilling), None)
            if job is None:
                return
            before = job.computed
            self._guarded([job], partial(self._prefill, job, left))
            left -= max(job.computed - before, SMALLEST_CALL)

    def _prefill(self, job: Job, room: int) -> None:
        if not job.opened:
            # Not before its turn: the prompts before it may begin as it does, as those of its own choices do.
            self._open(job)
        prompt = job.sequence.request.prompt_ids
        chunk = prompt[job.fed : job.fed + room]
        last = job.fed + len(chunk) == len(prompt)
        logits = self.rows.prefill(job.key, chunk, last=last)
        job.fed += len(chunk)
        self._observer.prefilled(len(chunk))
        if logits is not None:
            self._advance(job, logits)

    def _decode(self, jobs: list[Job]) -> None:
        logits = self.rows.decode({job.key: job.next_token for job in jobs if job.next_token is not None})
        self._observer.decoded(len(jobs))
        for job in jobs:
            self._advance(job, logits[job.key])

    def _advance(self, job: Job, logits: FloatArray) -> None:
        first = not job.sequence.new_ids
        try:
            delivery = job.sequence.advance(np.asarray(logits, dtype=np.float32))
        except CushionError as e:
            self._finish(job, Delivery(end="error", usage=job.sequence.usage, error=e))
            return
        now = monotonic()
        self._observer.token(now - (job.submitted if first else job.last_token), first=first)
        job.last_token = now
        job.next_token = job.sequence.new_ids[-1]
        if delivery.end is None:
            job.deliver(delivery)
        else:
            self._finish(job, delivery)

    def _finish(self, job: Job, delivery: Delivery) -> None:
        job.next_token = None
        with self._changed:
            held = job in self._running
            (self._running if held else self._waiting).remove(job)
        if held:
            self._close(job)
        self._observer.finished(delivery.end or "error", monotonic() - job.submitted)
        job.deliver(delivery)

    def _close(self, job: Job) -> None:
        try:
            self.rows.close(job.key)
        except Exception:
            # Its tokens are not kept for reuse; nothing else depends on it.
            _LOG.exception("a row could not be kept")

    def _guarded(self, jobs: list[Job], work: Callable[[], None]) -> None:
        """Run a step; an error of the engine ends the sequences in it, and no others."""
        try:
            work()
        except Exception as e:
            if not isinstance(e, CushionError):
                _LOG.exception("the engine failed")
            error = e if isinstance(e, CushionError) else _engine_error(e)
            for job in [job for job in jobs if job in self._running]:
                self._finish(job, Delivery(end="error", usage=job.sequence.usage, error=error))


def _engine_error(error: Exception) -> CheckFailed:
    return CheckFailed(
        f"the engine failed: {type(error).__name__}: {error!s:.200}", hint="see the log of the server; report a bug"
    )


def _bound(deliver: Callable[[int, Delivery], None], index: int) -> Deliver:
    return lambda delivery: deliver(index, delivery)
