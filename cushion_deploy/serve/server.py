"""Runs the application with uvicorn, and shuts it down so that answers end with a reason."""

from __future__ import annotations

import signal
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn
from fastapi import FastAPI

from cushion_deploy.errors import UsageError
from cushion_deploy.serve.engine import Engine

_MARGIN_SECONDS = 5


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


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT the engine takes no more requests, and has ``drain_seconds`` to finish the others.

    Args:
        app: the application.
        engine: its engine.
        drain_seconds: seconds from the signal until what still runs is cut off.
        tls: certificate and key; None for plain HTTP.
    """

    def __init__(self, app: FastAPI, engine: Engine, drain_seconds: float = 20.0, tls: TlsFiles | None = None) -> None:
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
                ssl_certfile=tls.certificate if tls else None,
                ssl_keyfile=tls.key if tls else None,
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


def url(listener: socket.socket, *, tls: bool = False) -> str:
    """Return the address of a bound socket."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


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
