"""Ctrl-C (SIGINT) in a real process while it writes: everything is as before, and the next run goes on."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cushion_deploy.errors import UsageError
from cushion_deploy.store import StageStore, publish, staging_area

STAGE = """
import sys, time
from pathlib import Path
from cushion_deploy.store import StageStore
store = StageStore(Path(sys.argv[1]))
with store.lock():
    (store.scratch("search", "k") / "scores").write_text("1 2 3")
    with store.write("search", "k") as staged:
        (staged / "prefix").write_text("half")
        print("ready", flush=True)
        time.sleep(60)
"""

PUBLISH = """
import sys, time
from pathlib import Path
from cushion_deploy.store import staging_area
with staging_area(Path(sys.argv[1])) as staged:
    (staged / "model.onnx").write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


def _stopped(code: str, argument: Path, signal_number: int) -> int:
    with subprocess.Popen(
        [sys.executable, "-c", code, str(argument)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal_number)
            process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode


def test_an_interrupted_stage_leaves_nothing_but_its_scratch(tmp_path: Path) -> None:
    assert _stopped(STAGE, tmp_path, signal.SIGINT) == -signal.SIGINT
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] in (
        ["lock", "scratch/search/k/scores"],
        ["scratch/search/k/scores", "lock"],
        ["scratch/search/k/scores"],
    )
    store = StageStore(tmp_path)
    with store.lock():
        assert store.find("search", "k") is None
        assert (store.scratch("search", "k") / "scores").read_text() == "1 2 3"
        with store.write("search", "k") as staged:
            (staged / "prefix").write_text("whole")
    assert store.find("search", "k") is not None


def test_a_killed_build_frees_the_lock_and_is_swept(tmp_path: Path) -> None:
    assert _stopped(STAGE, tmp_path, signal.SIGKILL) == -signal.SIGKILL
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    with StageStore(tmp_path).lock():
        assert list((tmp_path / "tmp").iterdir()) == []


def test_a_living_build_in_another_process_keeps_the_lock_and_its_files(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", STAGE, str(tmp_path)], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            with pytest.raises(UsageError, match="another command"), StageStore(tmp_path).lock():
                pass
            assert StageStore(tmp_path).sweep() == []
            assert len(list((tmp_path / "tmp").glob("*/files/prefix"))) == 1
        finally:
            process.kill()


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_build_leaves_the_published_bundle_alone(tmp_path: Path, signal_number: int) -> None:
    out = tmp_path / "out"
    with staging_area(out) as staged:
        (staged / "model.onnx").write_text("old")
        publish(staged, out, {}, {})
    assert _stopped(PUBLISH, out, signal_number) == -signal_number
    assert (out / "model.onnx").read_text() == "old"
    if signal_number == signal.SIGINT:
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with staging_area(out) as staged:
        assert len(list(tmp_path.iterdir())) == 2
