"""The stage store: reuse, damage, clean-up, scratch folders and the lock."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.errors import UsageError
from cushion_deploy.store import StageStore, place
from cushion_deploy.store.digests import digest_json

KEY = "0" * 64


def _filled(root: Path) -> StageStore:
    store = StageStore(root)
    with store.write("search", KEY, {"device": "cpu"}) as folder:
        (folder / "prefix.safetensors").write_bytes(b"keys and values")
        (folder / "trace").mkdir()
        (folder / "trace" / "1.json").write_text("{}")
    return store


def test_a_finished_stage_is_found_by_its_key_only(tmp_path: Path) -> None:
    store = _filled(tmp_path / "work")
    folder = store.find("search", KEY)
    assert folder is not None
    assert (folder / "prefix.safetensors").read_bytes() == b"keys and values"
    assert (folder / "trace" / "1.json").read_text() == "{}"
    assert store.find("search", "1" * 64) is None
    assert store.find("export", KEY) is None
    assert StageStore(tmp_path / "nowhere").find("search", KEY) is None


def test_nothing_is_found_while_a_stage_is_being_written(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    with store.write("search", KEY) as folder:
        (folder / "a").write_text("x")
        assert store.find("search", KEY) is None
    assert store.find("search", KEY) is not None
    assert list((tmp_path / "tmp").iterdir()) == []


DAMAGE = [
    "fact",
    "flip",
    "truncate",
    "append",
    "delete",
    "extra",
    "link",
    "no manifest",
    "other key",
    "no table",
    "not json",
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_stage_is_swept_away_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = _filled(tmp_path)
    folder = tmp_path / "stages" / "search" / KEY
    victim, manifest = folder / "prefix.safetensors", folder / "stage.json"
    data = victim.read_bytes()
    if damage == "fact":
        text = manifest.read_text()
        assert '"device": "cpu"' in text
        manifest.write_text(text.replace('"device": "cpu"', '"device": "cpq"'))
    elif damage == "flip":
        victim.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "truncate":
        victim.write_bytes(data[:-1])
    elif damage == "append":
        victim.write_bytes(data + b"\0")
    elif damage == "delete":
        victim.unlink()
    elif damage == "extra":
        (folder / "extra").write_text("")
    elif damage == "link":
        victim.rename(tmp_path / "elsewhere")
        victim.symlink_to(tmp_path / "elsewhere")
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "other key":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "key": "1" * 64}))
    elif damage == "no table":
        content = {"stage": "search", "key": KEY, "files": []}
        text = json.dumps({**content, "digest": digest_json(content)}, indent=1)
        manifest.write_text(f"{text}\n")
    else:
        manifest.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert store.find("search", KEY) is None
    assert "stage search is damaged" in caplog.text
    assert "cushion.json" not in caplog.text
    assert damage != "no table" or "stage.json has no table of files" in caplog.text
    assert not folder.exists()
    _filled(tmp_path)
    assert store.find("search", KEY) == folder


def test_an_edit_through_a_hard_link_is_noticed(tmp_path: Path) -> None:
    store = _filled(tmp_path / "work")
    folder = store.find("search", KEY)
    assert folder is not None
    place(folder / "prefix.safetensors", tmp_path / "bundle" / "prefix.safetensors")
    with open(tmp_path / "bundle" / "prefix.safetensors", "r+b") as f:
        f.write(b"K")
    assert store.find("search", KEY) is None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_write_leaves_the_store_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    store = _filled(tmp_path)
    before = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def fail() -> None:
        with store.write("search", KEY) as folder:
            (folder / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_writing_again_replaces_the_stage(tmp_path: Path) -> None:
    store = _filled(tmp_path)
    with store.write("search", KEY) as folder:
        (folder / "new").write_text("x")
    found = store.find("search", KEY)
    assert found is not None
    assert sorted(p.name for p in found.iterdir()) == ["new", "stage.json"]


def test_empty_stages_and_empty_folders_are_found(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    with store.write("empty", KEY) as folder:
        (folder / "engines").mkdir()
    assert store.find("empty", KEY) is not None


def test_scratch_survives_failure_and_goes_with_success(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    (store.scratch("search", KEY) / "scores.json").write_text("[1]")
    (store.scratch("search", "1" * 64) / "scores.json").write_text("[2]")
    with pytest.raises(RuntimeError), store.write("search", KEY):
        raise RuntimeError
    assert (store.scratch("search", KEY) / "scores.json").read_text() == "[1]"
    with store.write("search", KEY):
        pass
    assert list(store.scratch("search", KEY).iterdir()) == []
    assert (store.scratch("search", "1" * 64) / "scores.json").read_text() == "[2]"


def test_a_second_build_is_refused_at_once(tmp_path: Path) -> None:
    with StageStore(tmp_path).lock():
        with pytest.raises(UsageError, match="another command is using") as e, StageStore(tmp_path).lock():
            pass
        assert str(tmp_path / "lock") in e.value.message
    with StageStore(tmp_path).lock():
        pass


def test_sweep_leaves_living_owners_and_foreign_files_alone(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    with store.write("search", KEY) as folder:
        (tmp_path / "tmp" / "notes.txt").write_text("mine")
        dead = tmp_path / "tmp" / f"tmp-{'a' * 32}"
        (dead / "files").mkdir(parents=True)
        (dead / "files" / "half").write_text("x")
        assert store.sweep() == [dead]
        assert folder.is_dir()
    assert (tmp_path / "tmp" / "notes.txt").exists()
    assert store.find("search", KEY) is not None


def test_partial_results_are_swept_once_their_stage_is_finished(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    with store.write("search", KEY):
        pass
    (finished := store.scratch("search", KEY)).joinpath("scan").write_text("left by a kill right after the rename")
    (partial := store.scratch("search", "1" * 64)).joinpath("scan").write_text("to be continued")
    assert store.sweep() == [finished]
    assert not finished.exists()
    assert (partial / "scan").exists()


def test_taking_the_lock_sweeps(tmp_path: Path) -> None:
    dead = tmp_path / "tmp" / f"tmp-{'a' * 32}"
    (dead / "files").mkdir(parents=True)
    with StageStore(tmp_path).lock():
        assert not dead.exists()


@given(name=st.sampled_from(["", ".", "..", "a/b", "../x", "a\\b", "a\0", "-x", "x" * 129, "é"]))
def test_names_that_could_leave_the_work_folder_are_refused(name: str) -> None:
    store = StageStore(Path("/nonexistent"))
    with pytest.raises(ValueError, match="not a valid stage name"):
        store.find(name, KEY)
    with pytest.raises(ValueError, match="not a valid stage name"):
        store.find("search", name)
