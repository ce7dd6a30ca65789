"""Publication of bundles: what may be replaced, what is left when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store import publish, recover, require_publishable, staging_area, verify_bundle


def _snapshot(folder: Path) -> dict[str, bytes | None]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() and not p.is_symlink() else None
        for p in folder.rglob("*")
    }


def _build(out: Path, during: Callable[[Path], None] = lambda _: None) -> Path:
    with staging_area(out) as staged:
        (staged / "model.onnx").write_text("new")
        during(staged)
        return publish(staged, out, {}, {})


def test_a_published_bundle_carries_its_manifest(bundle: Path) -> None:
    raw = json.loads((bundle / "cushion.json").read_text())
    assert raw["schema"] == 1
    assert raw["tool"] == "cushion-deploy"
    assert raw["recipe"] == {"seed": 3, "search": {"tau": 0.5}}
    assert raw["parents"] == {"model": "ab" * 32}
    on_disk = {p.relative_to(bundle).as_posix(): p for p in bundle.rglob("*") if p.is_file()}
    on_disk.pop("cushion.json")
    assert raw["files"] == {
        name: {"sha256": hashlib.sha256(p.read_bytes()).hexdigest(), "size": p.stat().st_size}
        for name, p in on_disk.items()
    }
    age = datetime.now(timezone.utc) - datetime.fromisoformat(raw["created"])
    assert timedelta(seconds=-1) <= age < timedelta(minutes=5)
    manifest = verify_bundle(bundle)
    assert manifest.to_json() == {k: v for k, v in raw.items() if k != "digest"}
    assert manifest.digest == raw["digest"]


def test_a_bundle_gets_the_permissions_of_an_ordinary_folder(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    _build(tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_missing_parents_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    verify_bundle(_build(tmp_path / "a" / "b" / "out"))
    (tmp_path / "empty").mkdir()
    verify_bundle(_build(tmp_path / "empty"))


def test_a_bundle_of_ours_is_replaced_whole(bundle: Path) -> None:
    _build(bundle)
    assert set(verify_bundle(bundle).files) == {"model.onnx"}
    assert [p.name for p in bundle.parent.iterdir()] == ["out"]


def test_a_damaged_bundle_of_ours_is_replaced(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    verify_bundle(_build(bundle))


def test_a_link_to_a_bundle_stays_a_link(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle)
    _build(tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink()
    assert set(verify_bundle(bundle).files) == {"model.onnx"}


FOREIGN = ["file", "folder", "other json", "extra file in a bundle", "link in a bundle"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_not_ours_is_never_touched(tmp_path: Path, bundle: Path, kind: str) -> None:
    out = tmp_path / "foreign"
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    elif kind == "other json":
        out.mkdir()
        (out / "cushion.json").write_text('{"schema": 1}')
    elif kind == "extra file in a bundle":
        out = bundle
        (out / "notes.txt").write_text("mine")
    else:
        out = bundle
        (out / "notes").symlink_to(tmp_path)
    before = _snapshot(tmp_path)
    with pytest.raises(UsageError) as e:
        require_publishable(out)
    assert str(out) in e.value.message
    with pytest.raises(UsageError), staging_area(out):
        pytest.fail("the body must not run")
    assert _snapshot(tmp_path) == before


def test_what_appears_during_the_build_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def somebody_writes(_: Path) -> None:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")

    with pytest.raises(UsageError, match="not a bundle of ours"):
        _build(out, somebody_writes)
    assert _snapshot(tmp_path) == {"out": None, "out/thesis.tex": b"mine"}


def test_impossible_places_are_refused_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        require_publishable(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="mount point"):
        require_publishable(Path("/"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path("."), tmp_path):
        with pytest.raises(UsageError, match="current folder"):
            require_publishable(out)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="not writable"):
        require_publishable(tmp_path / "out")
    for too_long in ("x" * 300, "x" * 300 + "/below"):
        with pytest.raises(UsageError, match="too long"):
            require_publishable(tmp_path / too_long)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_build_leaves_the_old_bundle(bundle: Path, error: type[BaseException]) -> None:
    before = _snapshot(bundle.parent)

    def fail(_: Path) -> None:
        raise error

    with pytest.raises(error):
        _build(bundle, fail)
    assert _snapshot(bundle.parent) == before


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UsageError),
        (OSError(errno.ENOTEMPTY, "Directory not empty"), UsageError),
        (OSError(errno.EACCES, "Permission denied"), UsageError),
        (OSError(errno.EIO, "Input/output error"), OSError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_the_old_bundle_is_put_back_when_the_rename_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: type[BaseException]
) -> None:
    before = _snapshot(bundle.parent)
    rename = os.rename

    def failing(src: Path, dst: Path) -> None:
        if Path(src).name == "files":
            assert not bundle.exists()
            raise error
        rename(src, dst)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(expected):
        _build(bundle)
    assert _snapshot(bundle.parent) == before


@pytest.mark.parametrize(
    "name", ["weights.bin", "deep/model.PT", "a:b", "back\\slash", "new\nline", "cushion.JSON", "MODEL.onnx"]
)
def test_files_that_no_reader_accepts_are_not_published(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"

    def add(staged: Path) -> None:
        (staged / name).parent.mkdir(exist_ok=True)
        (staged / name).write_text("x")

    with pytest.raises(UntrustedArtifact):
        _build(out, add)
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_between_the_two_renames_puts_the_old_bundle_back(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = _snapshot(bundle.parent)
    rename = os.rename

    def interrupted(src: Path, dst: Path) -> None:
        rename(src, dst)
        if Path(dst).name == "previous":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _build(bundle)
    assert _snapshot(bundle.parent) == before


def test_a_folder_from_elsewhere_is_a_programming_error(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with pytest.raises(ValueError, match="staging_area"):
        publish(tmp_path / "files", tmp_path / "out", {}, {})


def test_recover_leaves_a_running_publication_alone(bundle: Path) -> None:
    with staging_area(bundle) as staged:
        recover(bundle)
        (staged / "model.onnx").write_text("second")
        publish(staged, bundle, {}, {})
    assert (bundle / "model.onnx").read_text() == "second"
