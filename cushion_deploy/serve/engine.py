"""A verified bundle with a session and a scheduler in a thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import time

from cushion_deploy.core.session import BatchSession, DecoderSession, context_limit
from cushion_deploy.runtime.bundle import Bundle
from cushion_deploy.serve.job import Job
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.observer import Observer
from cushion_deploy.serve.request import Delivery, SequenceRequest
from cushion_deploy.serve.rows import open_rows
from cushion_deploy.serve.scheduler import Limits, Scheduler

_LOG = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class EngineSettings:
    """Settings of the engine thread.

    Attributes:
        max_rows: most sequences in one batch; 1 is used where the session cannot batch.
        limits: limits of the scheduler.
        pool_bytes: most bytes of keys and values of earlier texts.
    """

    max_rows: int = 8
    limits: Limits = field(default_factory=Limits)
    pool_bytes: int = 512 << 20


class Engine:
    """Generates for all requests of the server.

    Args:
        name: name of the model for clients.
        bundle: the verified bundle.
        session: a session of one of its engines; closed by :meth:`stop`.
        engine: name of that engine.
        settings: batch, queue and pool.
        observer: is told what happens, for metrics.
    """

    def __init__(
        self,
        name: str,
        bundle: Bundle,
        session: DecoderSession,
        engine: str = "onnxruntime",
        settings: EngineSettings | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Prepare; nothing runs before :meth:`start`."""
        settings = settings or EngineSettings()
        self.name, self.bundle, self.engine = name, bundle, engine
        self.created = int(time())
        self.batches = isinstance(session, BatchSession)
        self.context_limit = context_limit(session.contract)
        self.vocab_size = session.contract.vocab_size
        self.pool = KvPool(settings.pool_bytes)
        rows = open_rows(session, settings.max_rows, self.pool)
        self.scheduler = Scheduler(rows, bundle.tokenizer, frozenset(bundle.eos_token_ids), settings.limits, observer)
        self._session = session
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether new requests are taken."""
        return self.alive and not self.scheduler.draining

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, requests: Sequence[SequenceRequest], deliver: Callable[[int, Delivery], None]) -> list[Job]:
        """Queue sequences; see :meth:`~cushion_deploy.serve.scheduler.Scheduler.submit`."""
        return self.scheduler.submit(list(requests), deliver)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and cut off those that have not ended after ``seconds``."""
        self.scheduler.drain(seconds)

    def stop(self) -> None:
        """Cut off everything, end the thread and close the session."""
        self.scheduler.drain(0)
        self._stopping.set()
        self._thread.join(timeout=60)
        self._session.close()

    def _run(self) -> None:
        try:
            while True:
                if self.scheduler.step():
                    continue
                if self._stopping.is_set():
                    return
                self.scheduler.wait(_IDLE_SECONDS)
        except BaseException:
            # Requests would wait for ever; /health says that the thread is gone.
            _LOG.exception("the engine thread ended")
            self.scheduler.abandon()
            raise
