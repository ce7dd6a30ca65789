"""The digest cache: an unchanged file is read once, a changed one again, and no trouble with the cache is an error."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.store import digest_cache, verify_bundle
from cushion_deploy.store.digest_cache import cache_file, cached_digests

AGO = 3.0


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache file, in a folder of this test; files count as settled at once."""
    monkeypatch.setenv("CUSHION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "SETTLED_NS", -1_000_000_000)
    return tmp_path / "cache" / "digests.json"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are read, as they are."""
    found: list[str] = []
    hash_file = digest_cache.hash_file

    def counted(path: Path) -> str:
        found.append(path.name)
        return hash_file(path)

    monkeypatch.setattr(digest_cache, "hash_file", counted)
    return found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def written(path: Path, data: bytes = b"weights") -> Path:
    path.write_bytes(data)
    return path


def test_a_file_is_read_once(cache: Path, tmp_path: Path, reads: list[str]) -> None:
    one, two = written(tmp_path / "one", b"1"), written(tmp_path / "two", b"2")
    for _ in range(2):
        assert list(cached_digests([two, one]).items()) == [(two, sha256(b"2")), (one, sha256(b"1"))]
    assert reads == ["two", "one"]
    assert set(json.loads(cache.read_text())["files"]) == {str(one), str(two)}


def test_a_link_is_another_name_of_the_same_file(cache: Path, tmp_path: Path, reads: list[str]) -> None:
    blob, link = written(tmp_path / "blob"), tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert cached_digests([blob])[blob] == cached_digests([link])[link]
    assert reads == ["blob"]
    link.unlink()
    link.symlink_to(written(tmp_path / "other", b"others!"))
    assert cached_digests([link])[link] == sha256(b"others!")


@pytest.mark.skipif(os.name == "nt", reason="no change time on Windows")
def test_an_edit_of_the_same_size_with_its_time_set_back_is_noticed(cache: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "file", b"original")
    before = file.stat()
    cached_digests([file])
    time.sleep(0.05)  # a tick of the file system's clock
    with file.open("r+b") as f:
        f.write(b"replaced")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    assert cached_digests([file])[file] == sha256(b"replaced")


def test_a_file_that_was_replaced_by_rename_is_noticed(cache: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "file", b"original")
    cached_digests([file])
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    os.utime(written(tmp_path / "new", b"replaced"), ns=times)
    os.replace(tmp_path / "new", file)
    assert cached_digests([file])[file] == sha256(b"replaced")


def test_a_file_that_just_changed_is_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED_NS", 2_000_000_000)
    file = written(tmp_path / "file")
    cached_digests([file])
    assert not cache.exists()
    # Its modification time alone says nothing: anybody can set that back.
    os.utime(file, (1, 1))
    cached_digests([file])
    assert not cache.exists()
    now = time.time_ns()
    monkeypatch.setattr("cushion_deploy.store.digest_cache.time.time_ns", lambda: now + int(AGO * 1e9))
    cached_digests([file])
    assert cache.exists()


def test_a_file_that_changes_while_it_is_read_is_not_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "file")
    hash_file = digest_cache.hash_file

    def slowly(path: Path) -> str:
        digest = hash_file(path)
        path.write_bytes(b"longer weights")
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(digest_cache, "hash_file", slowly)
        cached_digests([file])
    assert cached_digests([file])[file] == sha256(b"longer weights")


def entry(path: Path, digest: object) -> dict[str, Any]:
    return {"schema": 1, "files": {str(path): [*digest_cache.FileState.of(path), digest]}}


DAMAGE: list[Any] = [
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    [],
    {"schema": 2, "files": {}},
    {"schema": 1, "files": []},
    {"schema": 1, "files": {"FILE": None}},
    {"schema": 1, "files": {"FILE": [1, 2, 3, 4, "0" * 64]}},
]


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_cache_is_ignored_and_replaced(cache: Path, tmp_path: Path, damage: Any, reads: list[str]) -> None:
    file = written(tmp_path / "file")
    cache.parent.mkdir()
    cache.write_bytes(
        damage if isinstance(damage, bytes) else json.dumps(damage).replace("FILE", file.as_posix()).encode()
    )
    for _ in range(2):
        assert cached_digests([file])[file] == sha256(b"weights")
    assert reads == ["file"]


@pytest.mark.parametrize("digest", ["0" * 63, "g" * 64, "", 0, None, ["0" * 64]])
def test_a_digest_that_is_none_is_not_used(cache: Path, tmp_path: Path, digest: object) -> None:
    file = written(tmp_path / "file")
    cache.parent.mkdir()
    cache.write_text(json.dumps(entry(file, digest)))
    assert cached_digests([file])[file] == sha256(b"weights")


def test_what_the_folder_of_the_cache_is_trusted_with(cache: Path, tmp_path: Path) -> None:
    # The limit that the documentation states: who can write there can pass one checkpoint for another.
    file = written(tmp_path / "file")
    cache.parent.mkdir()
    cache.write_text(json.dumps(entry(file, "0" * 64)))
    assert cached_digests([file])[file] == "0" * 64


def test_entries_of_files_that_are_gone_or_changed_are_dropped(cache: Path, tmp_path: Path) -> None:
    gone, changed, stays = (written(tmp_path / name) for name in ("gone", "changed", "stays"))
    cached_digests([gone, changed, stays])
    gone.unlink()
    changed.write_bytes(b"longer weights")
    new = written(tmp_path / "new")
    cached_digests([new])
    assert set(json.loads(cache.read_text())["files"]) == {str(stays), str(new)}


def test_the_number_of_entries_is_bounded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "MAX_ENTRIES", 2)
    files = [written(tmp_path / str(i)) for i in range(4)]
    for file in files:
        cached_digests([file])
    assert list(json.loads(cache.read_text())["files"]) == [str(file) for file in files[2:]]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED_NS", -1_000_000_000)
    file = written(tmp_path / "file")
    # Root may write anywhere, so the folder lies where no folder can be.
    monkeypatch.setenv("CUSHION_CACHE_DIR", str(file / "below"))
    assert cached_digests([file])[file] == sha256(b"weights")

    def refused(*_: Any) -> None:
        raise PermissionError(13, "read-only")

    monkeypatch.setenv("CUSHION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(digest_cache, "replace_file", refused)
    assert cached_digests([file])[file] == sha256(b"weights")


def test_an_interrupt_keeps_the_digests_of_the_files_that_were_read(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = written(tmp_path / "first"), written(tmp_path / "second")
    hash_file = digest_cache.hash_file

    def stopped(path: Path) -> str:
        if path == second:
            raise KeyboardInterrupt
        return hash_file(path)

    monkeypatch.setattr(digest_cache, "hash_file", stopped)
    with pytest.raises(KeyboardInterrupt):
        cached_digests([first, second])
    assert set(json.loads(cache.read_text())["files"]) == {str(first)}


def test_a_file_that_is_missing_is_an_error(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cached_digests([tmp_path / "gone"])


def _many(folder: Path, names: range) -> None:
    digest_cache.SETTLED_NS = -1_000_000_000
    for i in names:
        cached_digests([folder / str(i)])


def test_two_processes_leave_a_valid_cache(cache: Path, tmp_path: Path) -> None:
    for i in range(40):
        written(tmp_path / str(i), str(i).encode())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_many, args=(tmp_path, range(start, 40, 2))) for start in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    files = json.loads(cache.read_text())["files"]
    assert files
    assert all(row[-1] == sha256(Path(path).name.encode()) for path, row in files.items())
    assert [path.name for path in cache.parent.iterdir()] == ["digests.json"]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("CUSHION_CACHE_DIR", raising=False)
    assert cache_file() == tmp_path / ".cache" / "cushion-deploy" / "digests.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_file() == tmp_path / ".cache" / "cushion-deploy" / "digests.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_file() == tmp_path / "xdg" / "cushion-deploy" / "digests.json"
    monkeypatch.setenv("CUSHION_CACHE_DIR", "~/own")
    assert cache_file() == tmp_path / "own" / "digests.json"
    monkeypatch.setenv("CUSHION_CACHE_DIR", "")
    assert cache_file() is None


def test_without_a_cache_every_file_is_read(tmp_path: Path, reads: list[str]) -> None:
    file = written(tmp_path / "file")
    cached_digests([file])
    cached_digests([file])
    assert (os.environ["CUSHION_CACHE_DIR"], reads) == ("", ["file", "file"])


def test_a_bundle_is_verified_without_the_cache(cache: Path, bundle: Path, reads: list[str]) -> None:
    verify_bundle(bundle)
    assert reads == []
    assert not cache.exists()
