"""Runs the application with uvicorn, and shuts it down so that answers end with a reason."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from cushion_deploy.errors import UsageError
from cushion_deploy.serve.connection import Connection
from cushion_deploy.serve.engine import Engine

_POLL_SECONDS = 0.1
_LAST_SECONDS = 10


@dataclass(frozen=True)
class TlsFiles:
    """PEM files of a TLS server: its certificate with the chain behind it, and its key.

    Raises:
        UsageError: a file cannot be read, the key is encrypted, or it is not that of the certificate.
    """

    certificate: Path
    key: Path

    def __post_init__(self) -> None:
        try:
            # Without a password OpenSSL would ask for it on the terminal.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except OSError as e:  # ssl.SSLError is one
            raise UsageError(
                f"TLS cannot use {self.certificate} and {self.key}: {e.strerror or e}",
                hint="give a PEM certificate and its PEM key without a password",
            ) from e


@dataclass(frozen=True)
class Patience:
    """How long a server waits for its clients, in seconds.

    Attributes:
        drain: from a signal until what still runs is cut off.
        request: until a connection has sent the head of a request, or the next one.
        stall: in which a client must take 48 KiB of an answer that waits for it, or all of it.
        margin: from the cut until connections that are still open are closed.
    """

    drain: float = 20.0
    request: int = 30
    stall: float = 60.0
    margin: float = 3.0


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT the engine takes no more requests, and has a limited time to finish the others.

    Args:
        app: the application.
        engine: its engine.
        patience: limits of time.
        tls: certificate and key; None for plain HTTP.
    """

    def __init__(
        self, app: FastAPI, engine: Engine, patience: Patience | None = None, tls: TlsFiles | None = None
    ) -> None:
        """Configure uvicorn."""
        self._engine, self._patience = engine, patience or Patience()
        self._close_at: float | None = None
        connection: Any = partial(Connection, stall_seconds=self._patience.stall)
        super().__init__(
            uvicorn.Config(
                app,
                http=connection,
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=self._patience.request,
                # Of tasks that do not end although their connections have: none is known.
                timeout_graceful_shutdown=int(self._patience.drain + self._patience.margin) + _LAST_SECONDS,
                ssl_certfile=tls.certificate if tls else None,
                ssl_keyfile=tls.key if tls else None,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; a second signal cuts everything off."""
        if self.should_exit:
            self._cut_off_in(0, margin=0)
            return
        self._cut_off_in(self._patience.drain, self._patience.margin)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close each connection when it has its answer, and all that are left when the time is up.

        uvicorn waits for connections that it accepted a moment too late to close them, and for clients that read
        nothing; at the end of its own limit it logs a traceback for each.
        """
        if self._close_at is None:
            self._cut_off_in(self._patience.drain, self._patience.margin)
        closing = asyncio.ensure_future(self._close_connections())
        try:
            await super().shutdown(sockets)
        finally:
            closing.cancel()

    def _cut_off_in(self, seconds: float, margin: float) -> None:
        self._engine.drain(seconds)
        self._close_at = monotonic() + seconds + margin

    async def _close_connections(self) -> None:
        while True:
            late = self._close_at is not None and monotonic() >= self._close_at
            for connection in list(self.server_state.connections):
                if isinstance(connection, Connection) and (late or not connection.answering):
                    connection.transport.abort() if late else connection.transport.close()
            await asyncio.sleep(_POLL_SECONDS)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes a free one.

    Raises:
        UsageError: the address is not of this machine, or is in use.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as e:
        listener.close()
        raise UsageError(
            f"cannot listen on {host} port {port}: {e.strerror or e}", hint="give another --host or --port"
        ) from e
    return listener


def url(listener: socket.socket, *, tls: bool = False) -> str:
    """Return the address of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def run(server: Server, listener: socket.socket) -> None:
    """Serve until a signal comes; returns when every answer has ended."""
    # uvicorn handles signals only while it serves, and raises those that it had again when it is done.
    before = {number: signal.signal(number, server.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
