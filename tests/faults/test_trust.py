"""A sample of ``bench/trust.py``: builds that are stopped or raced, flipped bits and mutated inputs."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_a_sample_of_every_fault_that_needs_no_root_leaves_nothing_corrupt() -> None:
    command = [sys.executable, "bench/trust.py", "signal", "race", "flip", "mutate", "--share", "0.002", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    kinds = json.loads(found.stdout)["kinds"]
    assert kinds["signal"]["tried"] == {"SIGINT": 1, "SIGTERM": 1}
    assert sum(kinds["race"]["tried"].values()) == 1
    assert sum(kinds["flip"]["tried"].values()) == 4
    assert len(kinds["mutate"]["tried"]) == 10


@pytest.fixture
def trust(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return the module ``bench/trust.py``; the handlers of signals are restored afterwards."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield importlib.import_module("trust")
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_count_that_is_stopped_keeps_what_it_has_counted(trust: Any, number: int) -> None:
    ended = []

    def trials() -> Iterator[Any]:
        for i in range(1000):
            if i == 2:
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # as `timeout` does
            yield trust.Trial("some fault", i > 0, "broken" if i == 1 else "")
            ended.append(i)

    stop = trust.Stop()
    found = trust._count(trials(), stop)
    assert found["tried"] == {"some fault": 3}, "the trial that was running is counted"
    assert found["struck"] == {"some fault": 2}
    assert found["wrong"] == [{"kind": "some fault", "wrong": "broken"}]
    assert (stop.number, ended) == (number, [0, 1])


def test_the_exit_code_of_a_child_is_known_after_it_was_waited_for(trust: Any, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], start_new_session=True)
    child = importlib.import_module("forked").Child(process.pid, tmp_path / "log")
    assert (child.finish(60), child.wait(0), child.finish()) == (3, 3, 3)
    process.wait()  # for Popen, which does not know
