"""Runs the application with uvicorn, and shuts it down so that answers end with a reason."""

from __future__ import annotations

import signal
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cushion_deploy.errors import UsageError
from cushion_deploy.serve.engine import Engine

_MARGIN_SECONDS = 5


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT the engine takes no more requests, and has ``drain_seconds`` to finish the others.

    Args:
        app: the application.
        engine: its engine.
        drain_seconds: seconds from the signal until what still runs is cut off.
    """

    def __init__(self, app: FastAPI, engine: Engine, drain_seconds: float = 20.0) -> None:
        """Configure uvicorn."""
        self._engine, self._drain_seconds = engine, drain_seconds
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(drain_seconds) + _MARGIN_SECONDS,
            )
        )

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to shut down; a second signal cuts everything off."""
        self._engine.drain(0 if self.should_exit else self._drain_seconds)
        super().handle_exit(sig, frame)


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


def url(listener: socket.socket) -> str:
    """Return the address of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(server: Server, listener: socket.socket) -> None:
    """Serve until a signal comes; returns when every answer has ended."""
    # uvicorn raises the signals that it has handled again when it is done: by then they have had their effect.
    before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Take note of nothing."""
