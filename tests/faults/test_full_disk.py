"""A full or read-only disk in the middle of a stage or a publication: a clear error, and nothing half left behind."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.store import StageStore, publish, staging_area, verify_bundle


def _write_to_full_disk() -> None:
    # /dev/full answers every write as a full disk does, from the kernel.
    with open("/dev/full", "wb", buffering=0) as f:
        f.write(b"x")


def _stage(root: Path, during: Callable[[], None]) -> None:
    with StageStore(root).write("search", "k") as staged:
        (staged / "half").write_text("x")
        during()


def _bundle(out: Path, text: str, during: Callable[[], None] = lambda: None) -> None:
    with staging_area(out) as staged:
        (staged / "model.onnx").write_text(text)
        during()
        publish(staged, out, {}, {})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_while_a_stage_writes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"No space left on device \(.* free\)") as e:
        _stage(tmp_path, _write_to_full_disk)
    assert e.value.exit_code == ExitCode.USAGE
    assert isinstance(e.value.__cause__, OSError)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
    assert StageStore(tmp_path).find("search", "k") is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_while_a_bundle_is_staged(tmp_path: Path) -> None:
    _bundle(tmp_path / "out", "old")
    with pytest.raises(UsageError, match="No space left on device"):
        _bundle(tmp_path / "out", "new", _write_to_full_disk)
    verify_bundle(tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_every_sync_of_a_publication_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    out = tmp_path / "out"
    real = os.fsync
    calls = 0
    failing = -1

    def fsync(fd: int) -> None:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    _bundle(out, "old")
    total = calls
    assert total > 3
    for point in range(1, total + 1):
        calls, failing = 0, point
        with pytest.raises(UsageError) as e:
            _bundle(out, "new")
        assert os.strerror(code) in e.value.message
        verify_bundle(out)
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(UsageError, match="Permission denied"):
            _stage(tmp_path / "work", lambda: None)
        with pytest.raises(UsageError, match="not writable"):
            _bundle(tmp_path / "out", "new")
    finally:
        tmp_path.chmod(0o755)
