"""Clients that read nothing, read slowly, send nothing or stay connected: what they cost, and how the server ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from cushion_deploy.runtime import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.serve.app import create_app
from cushion_deploy.serve.connection import Connection
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.metrics import Metrics
from cushion_deploy.serve.server import Patience, Server, bind, run

baked = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
LARGE: Any = {"prompt": "the", "n": 12, "max_tokens": 85, "logprobs": 5, "logit_bias": {"2": -100}, "stream": True}
"""An answer of more than 200 KB, also when it is not streamed: more than waits in a connection."""
BUFFER = 4096
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@contextmanager
def connected(served: Any, sent: bytes) -> Iterator[socket.socket]:
    """Yield a socket that has sent something and read nothing."""
    address = urlsplit(served.url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        client.settimeout(20)
        client.connect((address.hostname, address.port))
        client.sendall(sent)
        yield client


def post(body: Any) -> bytes:
    content = json.dumps({"model": "tiny", **body}).encode()
    head = f"{HEAD}Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def until(what: Callable[[], Any], seconds: float = 20) -> bool:
    """Wait until something is so; return whether it is."""
    end = monotonic() + seconds
    while not what():
        if monotonic() > end:
            return False
        sleep(0.01)
    return True


def open_connections(served: Any) -> Any:
    return served.server.server_state.connections


def waiting(served: Any) -> bool:
    """Return whether a connection waits for its client to read."""
    return any(connection.flow.write_paused for connection in list(open_connections(served)))


def all_of(client: socket.socket) -> bytes:
    """Read until the end or a reset."""
    got = b""
    try:
        while piece := client.recv(16384):
            got += piece
    except ConnectionResetError:
        pass
    return got


@baked
@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_reads_nothing_holds_no_row_and_loses_its_connection(serve: Any, streamed: bool) -> None:
    served = serve(patience=Patience(stall=1.0), buffer=BUFFER)
    with connected(served, post({**LARGE, "stream": streamed})) as client:
        assert until(lambda: waiting(served))
        assert served.idle()
        assert until(lambda: not open_connections(served))
        assert len(all_of(client)) < 150_000
    assert until(lambda: not served.server.server_state.tasks)
    assert served.get("/health").status_code == 200


class Clock:
    """The timers of a loop, without its time."""

    def __init__(self) -> None:
        self.now, self.timers = 0.0, list[tuple[float, Callable[[], object], threading.Event]]()

    def call_later(self, seconds: float, callback: Callable[[], object]) -> Any:
        cancelled = threading.Event()
        self.timers.append((self.now + seconds, callback, cancelled))
        return SimpleNamespace(cancel=cancelled.set)

    def advance(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, callback, cancelled in due:
            if not cancelled.is_set():
                callback()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def connection(clock: Clock) -> tuple[Connection, MagicMock]:
    """Return a new connection and its transport; a request is awaited for 30 seconds, a reader for 60."""
    config = Config(FastAPI(), timeout_keep_alive=30)
    config.load()
    transport = MagicMock(**{"get_extra_info.return_value": None, "is_closing.return_value": False})
    made = Connection(config=config, server_state=ServerState(), app_state={}, _loop=clock, stall_seconds=60.0)
    made.connection_made(transport)
    return made, transport


def test_a_slow_reader_keeps_its_connection_until_it_takes_nothing(clock: Clock, connection: Any) -> None:
    made, transport = connection
    made._stop_head_timer()
    for _ in range(5):
        made.pause_writing()
        clock.advance(50)
        made.resume_writing()
    made.pause_writing()
    clock.advance(59)
    assert not transport.abort.called
    clock.advance(1)
    assert transport.abort.called


def test_the_last_bytes_for_a_reader_that_stopped_are_dropped_when_the_connection_closes(
    clock: Clock, connection: Any
) -> None:
    made, transport = connection
    made._stop_head_timer()
    made.pause_writing()
    transport.is_closing.return_value = True
    made.resume_writing()  # what is left is below the low-water mark, and nobody takes it
    clock.advance(60)
    assert transport.abort.called


def test_a_byte_now_and_then_is_no_request(clock: Clock, connection: Any) -> None:
    made, transport = connection
    for byte in b"GET /":
        made.data_received(bytes([byte]))
        clock.advance(5.9)
    assert not transport.abort.called
    clock.advance(1)
    assert transport.abort.called


def test_what_is_left_when_a_connection_closes_is_awaited_and_then_dropped(clock: Clock, connection: Any) -> None:
    made, transport = connection
    made._stop_head_timer()
    made.timeout_keep_alive_handler()
    assert transport.close.called
    clock.advance(59)
    assert not transport.abort.called
    clock.advance(1)
    assert transport.abort.called


@baked
def test_a_connection_without_a_request_is_closed_and_one_with_a_slow_answer_is_not(serve: Any) -> None:
    def slowed(session: Any) -> Any:
        run = session.run

        def late(*args: Any, **more: Any) -> Any:
            sleep(0.02)
            return run(*args, **more)

        session.run = late
        return session

    served = serve(patience=Patience(request=1), change=slowed)
    began = monotonic()
    asked = post({"prompt": "the", "max_tokens": 85, "logit_bias": {"2": -100}})
    with (
        connected(served, b"") as silent,
        connected(served, b"GET /") as half,
        connected(served, asked) as client,
    ):
        assert (all_of(silent), all_of(half)) == (b"", b"")
        got = b""
        while b'"finish_reason":"length"' not in got:
            piece = client.recv(4096)
            assert piece
            got += piece
    assert monotonic() - began > 1.0


@baked
@pytest.mark.parametrize("kind", ["nothing", "half", "body", "unread", "missed"])
def test_no_client_delays_the_end_beyond_its_limit(
    serve: Any, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    served = serve(patience=Patience(drain=0.5, margin=0.5), buffer=BUFFER)
    head = HEAD.encode() + b"Content-Length: 100\r\n"
    sent = {"nothing": b"", "half": head, "body": head + b"\r\n{", "unread": post(LARGE), "missed": b""}[kind]
    with connected(served, sent):
        assert until(lambda: waiting(served) if kind == "unread" else open_connections(served))
        if kind == "missed":  # as by a connection that is accepted after uvicorn has closed all others
            monkeypatch.setattr(H11Protocol, "shutdown", lambda self: None)
        served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(8)
        assert not served.thread.is_alive()
    assert capfd.readouterr().err == ""


@baked
def test_a_second_signal_ends_at_once(serve: Any) -> None:
    served = serve(drain=300, buffer=BUFFER)
    with connected(served, post(LARGE)):
        assert until(lambda: waiting(served))
        for _ in range(2):
            served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(8)
        assert not served.thread.is_alive()


@baked
def test_a_signal_before_the_server_listens_for_it_is_not_lost(
    bundle_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(bundle_path)
    engine = Engine("tiny", bundle, open_engine(bundle, threads=1))
    server = Server(create_app(engine, Metrics()), engine)
    original, missed = Server.run, threading.Event()

    def early(self: Server, **more: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(self, **more)

    def watch() -> None:
        missed.set()
        server.should_exit = True

    monkeypatch.setattr(Server, "run", early)
    watchdog = threading.Timer(10, watch)
    watchdog.start()
    with bind("127.0.0.1", 0) as listener:
        run(server, listener)
    watchdog.cancel()
    watchdog.join()
    assert not missed.is_set()
    assert not engine.alive
