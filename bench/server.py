"""A server in a process of its own, for the benchmarks: started, watched and stopped."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx2

_START_SECONDS = 300
_BEGINNINGS = ("verifying ", "loading ", "fetching ")
"""What `cushion-deploy serve` says while it starts."""


class StartError(RuntimeError):
    """The server ended, or did not answer in time."""


@dataclass(frozen=True)
class ServerProcess:
    """A running server: its address, the name of its model, and what it prints to standard error."""

    url: str
    model: str
    process: subprocess.Popen[str]
    log_file: IO[str]

    @property
    def rss(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) << 10

    @property
    def log(self) -> str:
        """All of standard error so far, apart from what is done at the start."""
        self.log_file.seek(0)
        return "".join(line for line in self.log_file if not line.startswith(_BEGINNINGS))

    def metric(self, name: str) -> float:
        """Return the value of a metric without labels."""
        text = httpx2.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise KeyError(name)
        return float(found[1])


@contextmanager
def cushion_server(bundle: Path, *options: str, threads: int = 2) -> Iterator[ServerProcess]:
    """Run ``cushion-deploy serve`` on a free port; SIGTERM at the end."""
    command = [sys.executable, "-m", "cushion_deploy", "serve", str(bundle), "--port", "0", "--threads", str(threads)]
    with _process([*command, *options]) as (process, errors):
        line = process.stdout.readline() if process.stdout else ""
        found = re.match(r"serving (\S+) on (\S+) ", line)
        if found is None:
            process.wait(10)
            errors.seek(0)
            raise StartError(errors.read()[-500:] or f"the server printed {line!r}")
        yield ServerProcess(found[2], found[1], process, errors)


@contextmanager
def other_server(command: Sequence[str], url: str, model: str) -> Iterator[ServerProcess]:
    """Run a server of someone else that has the OpenAI API at ``url``."""
    with _process(command) as (process, errors):
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            if process.poll() is not None:
                errors.seek(0)
                raise StartError(f"it ended with {process.returncode}: {errors.read().strip()[-300:]}")
            try:
                if httpx2.get(f"{url}/v1/models", timeout=5).status_code == 200:
                    break
            except httpx2.TransportError:
                time.sleep(0.2)
        else:
            raise StartError(f"it did not answer within {_START_SECONDS} seconds")
        yield ServerProcess(url, model, process, errors)


def bind_free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    # A file, because a process that prints more than a pipe holds would wait for a reader.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ)
        try:
            yield process, errors
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
