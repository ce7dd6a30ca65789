"""Hashing, linking, disk space and disk errors."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from cushion_deploy.errors import UsageError
from cushion_deploy.store import files, hash_file, hash_files, place, replace_file, require_space


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_hash_file_is_sha256_across_piece_boundaries(tmp_path: Path, size: int) -> None:
    data = bytes(i * 7 % 251 for i in range(1000)) * (size // 1000 + 1)
    path = tmp_path / "f"
    path.write_bytes(data[:size])
    assert hash_file(path) == hashlib.sha256(data[:size]).hexdigest()


def test_hash_files_keeps_order(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("b", "a")]
    for path in paths:
        path.write_text(path.name)
    assert list(hash_files(paths).items()) == [(p, hashlib.sha256(p.name.encode()).hexdigest()) for p in paths]


def test_place_links_where_possible(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    place(tmp_path / "a", tmp_path / "deep" / "b")
    assert (tmp_path / "deep" / "b").samefile(tmp_path / "a")


def test_place_copies_on_request_and_where_links_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("x")
    place(tmp_path / "a", tmp_path / "b", link=False)

    def no_link(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    place(tmp_path / "a", tmp_path / "c")
    for name in "bc":
        assert (tmp_path / name).read_text() == "x"
        assert not (tmp_path / name).samefile(tmp_path / "a")


@pytest.mark.parametrize("link", [True, False])
def test_place_follows_links_and_never_overwrites(tmp_path: Path, link: bool) -> None:
    (tmp_path / "a").write_text("x")
    (tmp_path / "link").symlink_to("a")
    place(tmp_path / "link", tmp_path / "b", link=link)
    assert not (tmp_path / "b").is_symlink()
    (tmp_path / "c").write_text("mine")
    with pytest.raises(FileExistsError):
        place(tmp_path / "a", tmp_path / "c", link=link)
    assert (tmp_path / "c").read_text() == "mine"


def test_replace_file_leaves_the_old_content_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    replace_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            replace_file(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
    assert path.read_bytes() == b"old"
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_require_space_states_free_and_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_500_000))
    require_space(tmp_path / "not" / "yet", 1_500_000)
    with pytest.raises(UsageError, match=r"2\.0 MB needed, 1\.5 MB free") as e:
        require_space(tmp_path / "not" / "yet", 2_000_000)
    assert "500.0 kB" in e.value.hint


def test_require_space_asks_the_real_disk(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not enough disk space"):
        require_space(tmp_path, 1 << 60)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_disk_errors_become_usage_errors_that_name_the_file(tmp_path: Path, code: int) -> None:
    with pytest.raises(UsageError, match=r"weights\.data") as e, files.disk_errors(tmp_path):
        raise OSError(code, os.strerror(code), "weights.data")
    assert os.strerror(code) in e.value.message
    assert e.value.hint


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Input/output") as e, files.disk_errors(tmp_path):
        raise OSError(errno.EIO, "Input/output error")
    assert not isinstance(e.value, UsageError)
