"""The tiny Llama of the runtime's tests, and servers of its bundle over a real socket."""

from __future__ import annotations

import faulthandler
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx2
import openai
import pytest
from tiny_llama import any_tokenizer, bundle_path, session, tiny, tokenizer, write_llama

from cushion_deploy.runtime import TextGenerator, load, open_bundle
from cushion_deploy.runtime.engine import open_engine
from cushion_deploy.serve.app import AppSettings, create_app
from cushion_deploy.serve.engine import Engine, EngineSettings
from cushion_deploy.serve.metrics import Metrics
from cushion_deploy.serve.server import Patience, Server, bind

__all__ = ["any_tokenizer", "bundle_path", "session", "tiny", "tokenizer"]


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Return the folder of a random Llama with enough positions for descriptions of tools."""
    return write_llama(tmp_path_factory.mktemp("hf"), tokenizer, 1024)


@dataclass(frozen=True)
class Served:
    """A running server."""

    url: str
    engine: Engine
    server: Server
    thread: threading.Thread
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, **more: Any) -> openai.OpenAI:
        """Return a client that is closed with the server."""
        self.clients.append(openai.OpenAI(base_url=f"{self.url}/v1", **{"api_key": "none", "max_retries": 0, **more}))
        return self.clients[-1]

    def get(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.get(self.url + path, **more)

    def post(self, path: str, **more: Any) -> httpx2.Response:
        return httpx2.post(self.url + path, **more)

    def idle(self, seconds: float = 20) -> bool:
        """Wait until nothing runs and nothing waits."""
        end = monotonic() + seconds
        while monotonic() < end:
            if not self.engine.scheduler.running + self.engine.scheduler.waiting:
                return True
            sleep(0.01)
        return False


@contextmanager
def running(
    path: Path, app: AppSettings, settings: EngineSettings, patience: Patience, change: Any, buffer: int | None = None
) -> Iterator[Served]:
    bundle, metrics = open_bundle(path), Metrics()
    session = change(open_engine(bundle, threads=1))
    engine = Engine("tiny", bundle, session, settings=settings, observer=metrics)
    server = Server(create_app(engine, metrics, app), engine, patience)
    listener = bind("127.0.0.1", 0)
    if buffer is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
    # A daemon, so that a server that does not stop cannot keep the test run from ending.
    thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
    thread.start()
    try:
        while not server.started:
            sleep(0.01)
        served = Served(f"http://127.0.0.1:{listener.getsockname()[1]}", engine, server, thread)
        yield served
        for client in served.clients:
            client.close()
    finally:
        engine.drain(0)
        server.should_exit = True
        thread.join(30)
        listener.close()
        if thread.is_alive():
            faulthandler.dump_traceback(all_threads=True)
            pytest.fail("the server did not stop")


@pytest.fixture
def serve(bundle_path: Path) -> Iterator[Callable[..., Served]]:
    """Return a function that starts a server; all are stopped after the test."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(
            app: AppSettings | None = None,
            settings: EngineSettings | None = None,
            drain: float = 5,
            change: Any = lambda session: session,
            path: Path = bundle_path,
            patience: Patience | None = None,
            buffer: int | None = None,
        ) -> Served:
            """``buffer`` is the size of the send buffers of its sockets in bytes."""
            patience, app, settings = patience or Patience(drain), app or AppSettings(), settings or EngineSettings()
            return stack.enter_context(running(path, app, settings, patience, change, buffer))

        yield start


@pytest.fixture(scope="session")
def served(bundle_path: Path) -> Iterator[Served]:
    """Return a server that many tests share; the test that changes it starts its own."""
    with running(
        bundle_path, AppSettings(), EngineSettings(max_rows=4), Patience(5), lambda session: session
    ) as server:
        yield server


@pytest.fixture(scope="session")
def client(served: Served) -> openai.OpenAI:
    """Return the client of OpenAI for the shared server."""
    return served.client()


@pytest.fixture(scope="session")
def generator(bundle_path: Path) -> TextGenerator:
    """Return the sequential runtime of the same bundle: what every answer is compared with."""
    return load(bundle_path, threads=1)
