"""A connection that ends when its client neither sends a request nor takes its answer."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol


class Connection(H11Protocol):
    """uvicorn's connection, with the two limits of time that it lacks; its own is that between two requests.

    A client that reads nothing costs a socket, at most 64 KiB that wait in it and what its answer has: its row runs on
    until the answer is complete. When the connection ends, the application is told that the client has gone.

    Args:
        stall_seconds: seconds in which a client must take 48 KiB of an answer that waits for it, or all of it.
        more: arguments of uvicorn.
    """

    def __init__(self, *, stall_seconds: float = 60.0, **more: Any) -> None:
        super().__init__(**more)
        self._stall_seconds = stall_seconds
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    @property
    def answering(self) -> bool:
        """Whether a request has begun and its answer is not complete."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Go on to wait for a request, unless it is here."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the client to take what is left."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._watch_stall()

    def timeout_keep_alive_handler(self) -> None:
        """Close; what is left of an answer may still be taken."""
        super().timeout_keep_alive_handler()
        self._watch_stall()

    def pause_writing(self) -> None:
        """Wait for the client to take what is left."""
        super().pause_writing()
        self._watch_stall()

    def resume_writing(self) -> None:
        """Go on; what is left when the connection closes still has to be taken."""
        super().resume_writing()
        self._stop_stall_timer()
        if self.transport.is_closing():
            self._watch_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop to wait."""
        self._stop_stall_timer()
        self._stop_head_timer()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.answering:
            self._stop_head_timer()
        elif self._head_timer is None:  # not once more for each byte
            self._head_timer = self.loop.call_later(self.timeout_keep_alive, self.transport.abort)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _watch_stall(self) -> None:
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._stall_seconds, self.transport.abort)

    def _stop_stall_timer(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None
