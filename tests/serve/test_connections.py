"""Clients that read nothing, read slowly, send nothing or stay connected: what they cost, and how the server ends."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any
from urllib.parse import urlsplit

import pytest
from uvicorn.protocols.http.h11_impl import H11Protocol

from cushion_deploy.runtime import open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.serve.app import create_app
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.metrics import Metrics
from cushion_deploy.serve.server import Patience, Server, bind, run

pytestmark = pytest.mark.parametrize("tiny", ["baked"], indirect=True)
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


def test_a_client_that_reads_slowly_gets_everything(serve: Any) -> None:
    served = serve(patience=Patience(stall=1.0), buffer=BUFFER)
    with connected(served, post(LARGE)) as client:
        assert until(lambda: waiting(served))
        began = monotonic()
        got = b""
        while not got.endswith(b"\r\n0\r\n\r\n"):
            piece = client.recv(8192)
            assert piece
            got += piece
            sleep(0.01)
    assert monotonic() - began > 1.0
    assert b"data: [DONE]" in got
    assert got.count(b'"finish_reason":"length"') == 12


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
    with connected(served, b"") as silent, connected(served, b"GET /heal") as half, connected(served, asked) as client:
        sleep(0.6)
        half.sendall(b"t")  # a byte now and then is no request
        assert (all_of(silent), all_of(half)) == (b"", b"")
        got = b""
        while b'"finish_reason":"length"' not in got:
            piece = client.recv(4096)
            assert piece
            got += piece
    assert monotonic() - began > 1.5


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


def test_a_second_signal_ends_at_once(serve: Any) -> None:
    served = serve(drain=300, buffer=BUFFER)
    with connected(served, post(LARGE)):
        assert until(lambda: waiting(served))
        for _ in range(2):
            served.server.handle_exit(signal.SIGTERM, None)
        served.thread.join(8)
        assert not served.thread.is_alive()


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
