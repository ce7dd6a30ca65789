"""Bundles made to harm: each exhibit is a folder that a careless reader would open."""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.errors import UntrustedArtifact, UsageError
from cushion_deploy.store import BundleManifest, FileEntry, verify_bundle


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """Return a bundle to spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


def _refused(bundle: Path, match: str) -> UntrustedArtifact:
    with pytest.raises(UntrustedArtifact, match=match) as e:
        verify_bundle(bundle)
    assert e.value.hint
    return e.value


def _forge(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and give it a digest that matches, as a forger would."""
    data = json.loads((bundle / "cushion.json").read_text())
    del data["digest"]
    change(data)
    if isinstance(data.get("files"), dict):
        data["files"] = dict(sorted(data["files"].items()))
    canonical = json.dumps(data, sort_keys=True, separators=(",", ":"))
    data["digest"] = hashlib.sha256(canonical.encode()).hexdigest()
    (bundle / "cushion.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def test_a_careful_forger_of_harmless_content_is_accepted(bundle: Path) -> None:
    # Says what the check is not: without a signature, whoever can write every file can make a valid bundle. And it
    # proves that the forgeries below are refused for their content, not for their digest.
    _forge(bundle, lambda d: d["parents"].update(model="cd" * 32))
    assert verify_bundle(bundle).parents == {"model": "cd" * 32}


PATHS = {
    "absolute": "/etc/passwd",
    "parent": "../outside",
    "parent inside": "engines/../../outside",
    "dot": "./model.onnx",
    "backslash": "..\\outside",
    "drive": "C:/outside",
    "NUL": "model.onnx\0.txt",
    "newline": "a\nb",
    "terminal escape": "\x1b[2Jmodel",
    "right-to-left override": "\u202egnp.onnx",
    "empty": "",
    "doubled slash": "engines//engine.json",
    "trailing slash": "engines/",
    "lone surrogate": "a\ud800",
    "the manifest": "cushion.json",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_dangerous_paths_are_refused_in_printable_words(bundle: Path, path: str) -> None:
    entry = {"sha256": "0" * 64, "size": 0}
    data = json.loads((bundle / "cushion.json").read_text())
    data["files"][path] = entry
    (bundle / "cushion.json").write_text(json.dumps(data))
    assert _refused(bundle, "lists").message.isprintable()


def test_names_that_differ_in_case_or_normal_form_only_are_refused(bundle: Path) -> None:
    for twin, other in (("MODEL.onnx", "model.onnx"), ("caf\u00e9", "cafe\u0301")):
        shutil.rmtree(bundle / "engines", ignore_errors=True)
        entry = {"sha256": "0" * 64, "size": 0}
        _forge(bundle, lambda d, names=(twin, other), e=entry: d.update(files={n: e for n in names}))  # type: ignore[misc]
        _refused(bundle, "differ in case only")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "w.pt", "w.PTH", "w.ckpt", "deep/w.pkl", ".pickle"])
def test_pickles_are_refused_even_when_listed(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"\x80\x04.")
    entry = {"sha256": hashlib.sha256(b"\x80\x04.").hexdigest(), "size": 3}
    _forge(bundle, lambda d: d["files"].update({name: entry}))
    _refused(bundle, "pickle")


def test_links_are_refused_wherever_they_point(bundle: Path, tmp_path: Path) -> None:
    for target in (bundle / "model.onnx", tmp_path / "nowhere", Path("/dev/zero"), tmp_path):
        (bundle / "link").symlink_to(target)
        _refused(bundle, "symbolic link")
        (bundle / "link").unlink()


def test_a_link_in_place_of_the_manifest_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "cushion.json").rename(tmp_path / "cushion.json")
    (bundle / "cushion.json").symlink_to(tmp_path / "cushion.json")
    _refused(bundle, "expected a plain file")


def test_a_link_in_place_of_a_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    (bundle / "engines").rename(tmp_path / "engines")
    (bundle / "engines").symlink_to(tmp_path / "engines")
    _refused(bundle, "symbolic link")


@pytest.mark.parametrize("name", ["model.onnx", "cushion.json", "extra"])
def test_a_pipe_is_refused_without_waiting_on_it(bundle: Path, name: str) -> None:
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    _refused(bundle, "special file")


def test_a_socket_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle)
    with socket.socket(socket.AF_UNIX) as s:
        s.bind("s")
        _refused(bundle, "special file")


def test_a_manifest_of_absurd_size_is_refused_unread(bundle: Path) -> None:
    with open(bundle / "cushion.json", "wb") as f:
        f.truncate(1 << 40)
    _refused(bundle, "bytes, more than")


MANIFESTS = {
    "empty": b"",
    "binary": b"\xff\xfe\x00",
    "cut": b'{"schema": 1, "files"',
    "nested": b"[" * 100_000,
    "list": b"[]",
    "null": b"null",
    "no fields": b'{"schema": 1}',
    "twice": b'{"schema": 1, "schema": 1}',
    "NaN": b'{"schema": NaN}',
    "schema text": b'{"schema": "1"}',
    "schema true": b'{"schema": true}',
    "schema zero": b'{"schema": 0}',
    "huge number": b'{"schema": ' + b"9" * 100_000 + b"}",
}


@pytest.mark.parametrize("raw", MANIFESTS.values(), ids=MANIFESTS)
def test_what_is_no_manifest_is_refused(bundle: Path, raw: bytes) -> None:
    (bundle / "cushion.json").write_bytes(raw)
    assert len(_refused(bundle, r"cushion\.json").message) < 500


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no files": lambda d: d.pop("files"),
    "unknown field": lambda d: d.update(run="rm"),
    "files list": lambda d: d.update(files=[]),
    "recipe text": lambda d: d.update(recipe="x"),
    "parents numbers": lambda d: d.update(parents={"model": 1}),
    "created": lambda d: d.update(created="yesterday"),
    "entry text": lambda d: d["files"].update({"model.onnx": "x"}),
    "entry extra": lambda d: d["files"]["model.onnx"].update(url="http://"),
    "digest short": lambda d: d["files"]["model.onnx"].update(sha256="ab"),
    "digest upper": lambda d: d["files"]["model.onnx"].update(sha256="AB" * 32),
    "size negative": lambda d: d["files"]["model.onnx"].update(size=-1),
    "size true": lambda d: d["files"]["model.onnx"].update(size=True),
    "size float": lambda d: d["files"]["model.onnx"].update(size=256.0),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_manifests_of_the_wrong_form_are_refused(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _forge(bundle, change)
    _refused(bundle, r"cushion\.json has")


def test_a_later_schema_names_the_tool_that_reads_it(bundle: Path) -> None:
    (bundle / "cushion.json").write_text('{"schema": 7, "version": "3.1.0", "anything": []}')
    e = _refused(bundle, "schema version 7")
    assert "cushion-deploy 3.1.0" in e.hint
    (bundle / "cushion.json").write_text('{"schema": 7, "version": "\\u001b[2J; rm -rf"}')
    assert "later version" in _refused(bundle, "schema version 7").hint


def test_a_missing_manifest_is_refused(bundle: Path) -> None:
    (bundle / "cushion.json").unlink()
    _refused(bundle, r"has no cushion\.json")


def test_an_unlisted_file_with_a_hostile_name_is_named_printably(bundle: Path) -> None:
    (bundle / "\x1b[31mred").write_text("")
    assert _refused(bundle, "not listed").message.isprintable()


@pytest.mark.parametrize("name", ["model.onnx", "engines/cpu/engine.json"])
def test_the_first_bad_file_is_named(bundle: Path, name: str) -> None:
    (bundle / name).write_bytes(b"")
    _refused(bundle, f"'{name}'")


def test_no_file_but_the_manifest_is_opened_before_the_file_set_holds(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bundle / "zz-extra").write_text("")
    opened: list[str] = []
    real = builtins.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(Path(path).name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", spy)
    _refused(bundle, "zz-extra")
    assert opened == ["cushion.json"]


def test_what_is_no_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        verify_bundle(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        verify_bundle(tmp_path / "file")


def test_an_oversized_manifest_is_not_written_either() -> None:
    manifest = BundleManifest({"a": FileEntry("0" * 64, 0)}, {"text": "x" * (17 << 20)}, {})
    with pytest.raises(UsageError, match="more than"):
        manifest.to_bytes()
