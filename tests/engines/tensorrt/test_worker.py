"""The child process that builds a plan: every way in which it can end is an error here, never a crash."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cushion_deploy.engines.probe import child_environment
from cushion_deploy.engines.tensorrt.flavours import RTX
from cushion_deploy.engines.tensorrt.worker import run_worker
from cushion_deploy.errors import CheckFailed


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that puts a shell script in the place of the worker; it returns the scratch folder."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()

    def write(script: str) -> Path:
        file = tmp_path / "worker.sh"
        file.write_text(f"#!/bin/sh\ncd '{scratch}'\n{script}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(file))
        return scratch

    return write


def test_a_crash_of_the_library_is_an_error_with_its_last_log_lines(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in('for i in $(seq 1 40); do echo "INFO: step $i." >&2; done; kill -SEGV $$')
    with pytest.raises(CheckFailed, match="SIGSEGV") as caught:
        run_worker(RTX, {}, scratch)
    assert "INFO: step 40." in caught.value.message
    assert "INFO: step 9." not in caught.value.message


def test_a_worker_that_ends_without_an_outcome_is_an_error(stand_in: Callable[[str], Path]) -> None:
    with pytest.raises(CheckFailed, match="exit code 0"):
        run_worker(RTX, {}, stand_in("exit 0"))


def test_a_full_disk_in_the_worker_is_raised_here(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in(f'echo \'{{"os_error": [{errno.ENOSPC}, "No space left on device"]}}\' > outcome.json')
    with pytest.raises(OSError, match="No space left") as caught:
        run_worker(RTX, {}, scratch)
    assert caught.value.errno == errno.ENOSPC


def test_an_interrupt_kills_the_worker_at_once(stand_in: Callable[[str], Path]) -> None:
    scratch = stand_in("read request; echo $$ > pid; kill -USR1 $PPID; exec sleep 60")

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_worker(RTX, {}, scratch)
    finally:
        signal.signal(signal.SIGUSR1, previous)
    with pytest.raises(ProcessLookupError):
        os.kill(int((scratch / "pid").read_text()), 0)


def test_the_worker_leaves_when_its_parent_is_gone() -> None:
    code = (
        "import threading, time\n"
        "from cushion_deploy.engines.tensorrt.worker import _leave_with_parent\n"
        "threading.Thread(target=_leave_with_parent, daemon=True).start()\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=child_environment()
    )
    try:
        _, errors = child.communicate(timeout=30)
        assert (child.returncode, errors) == (1, b"")
    finally:
        child.kill()
        child.wait()
