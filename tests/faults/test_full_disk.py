"""A full or read-only disk in the middle of a stage or a publication: a clear error, and nothing half left behind."""

from __future__ import annotations

import errno
import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from cushion_deploy.cli.main import cli, run
from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.store import StageStore, publish, staging_area, verify_bundle
from cushion_deploy.store.files import temporary_folder, write_file


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


@pytest.mark.parametrize("library", ["safetensors", "tokenizers"])
def test_a_full_disk_is_recognized_in_errors_of_libraries(tmp_path: Path, library: str) -> None:
    # Not /dev/full: these libraries replace the file that they write to.
    def save() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            if library == "safetensors":
                save_file({"x": np.zeros(4096, dtype=np.float32)}, tmp_path / "tmp" / "x.safetensors")
            else:
                vocabulary = {f"token {i}": i for i in range(4096)}
                Tokenizer(models.WordLevel(vocabulary)).save(str(tmp_path / "tmp" / "tokenizer.json"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with pytest.raises(UsageError, match=r"File too large \(.* free\)") as e:
        _stage(tmp_path, save)
    assert not isinstance(e.value.__cause__, OSError)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_file_that_a_user_asked_for_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    file = tmp_path / "baseline.json"
    write_file(file, b"old")

    def fsync(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError, match=os.strerror(code)) as e:
        write_file(file, b"new")
    assert str(file) in e.value.message
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_pipe_that_a_user_names_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        write_file(pipe, b"report")
        assert os.read(reader, 100) == b"report"
        assert pipe.is_fifo()
    finally:
        os.close(reader)


def test_a_full_disk_for_temporary_files_names_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UsageError, match=rf"cannot write {tmp_path}: No space left"), temporary_folder("cushion-"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave tempfile no folder that exists: root could write to those of a real machine."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_machine_without_a_folder_for_temporary_files_is_told_so_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "never read"
    arguments = ["build", "--model", str(model), "--output", str(tmp_path / "out")]
    assert run(arguments) == ExitCode.USAGE
    found = capsys.readouterr().err
    assert "no folder for temporary files can be written to" in found
    assert "['/nowhere']" in found
    assert found.splitlines()[-1] == "  -> set TMPDIR to a folder that you may write to, on a disk that is not full"


@pytest.mark.usefixtures("no_temporary_folder")
def test_a_library_that_finds_no_folder_for_temporary_files_is_no_bug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "main", lambda *_, **__: tempfile.mkdtemp())
    assert run([]) == ExitCode.USAGE
    assert "set TMPDIR" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["n" * 255, "ü" * 127, "a" * 201])
def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path, name: str) -> None:
    _bundle(tmp_path / name, "old")
    _bundle(tmp_path / name, "new")
    verify_bundle(tmp_path / name)
    assert (tmp_path / name / "model.onnx").read_text() == "new"
    write_file(tmp_path / name[:-1], b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([name, name[:-1]])
