"""`clean`: what it removes from a work folder, what it says of that, and the folders that it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.store import StageStore, place

KEY, OTHER = "0" * 64, "1" * 64
DAY = 24 * 60 * 60


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Return a work folder: two searches and an export finished, one search partial, and a folder of a killed run."""
    store = StageStore(tmp_path / "work")
    for stage, key, size in (("search", KEY, 1000), ("search", OTHER, 200), ("export", KEY, 3_000_000)):
        with store.write(stage, key) as folder:
            (folder / "data").write_bytes(bytes(size))
    (store.scratch("search", "2" * 64) / "scores.json").write_bytes(bytes(50))
    dead = store.root / "tmp" / f"tmp-{'a' * 32}"
    (dead / "files").mkdir(parents=True)
    (dead / "files" / "half").write_bytes(bytes(7))
    with store.lock(sweep=False):
        pass
    return store.root


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def file_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_it_empties_a_work_folder_and_says_what_it_freed(cli: Any, work: Path) -> None:
    before = {path.name: file_bytes(path) for path in (work / "stages").iterdir()}
    total = file_bytes(work)
    done = cli("clean", "--work-dir", work, "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json == {
        "work_dir": str(work),
        "dry_run": False,
        "bytes": total,
        "removed": [
            {"stage": "export", "kind": "finished", "folders": 1, "bytes": before["export"]},
            {"stage": "search", "kind": "finished", "folders": 2, "bytes": before["search"]},
            {"stage": "search", "kind": "partial", "folders": 1, "bytes": 50},
            {"stage": "", "kind": "leftover", "folders": 1, "bytes": 7},
        ],
    }
    assert file_bytes(work) == 0
    assert StageStore(work).find("search", KEY) is None
    again = cli("clean", "--work-dir", work)
    assert (again.code, again.out) == (0, f"{work}: freed 0 B\n")


def test_a_person_reads_a_table(cli: Any, work: Path) -> None:
    kilobytes = f"{file_bytes(work / 'stages' / 'search') / 1000:.1f}"
    done = cli("clean", "--work-dir", work)
    assert done.code == 0
    first, *rows = done.out.splitlines()
    assert first == f"{work}: freed 3.0 MB"
    assert [row.split() for row in rows] == [
        ["export", "1", "3.0", "MB"],
        ["search", "2", kilobytes, "kB"],
        ["search", "(partial)", "1", "50", "B"],
        ["leftovers", "of", "killed", "runs", "1", "7", "B"],
    ]


def test_a_dry_run_says_the_same_and_removes_nothing(cli: Any, work: Path) -> None:
    before = contents(work)
    dry = cli("clean", "--work-dir", work, "--dry-run", "--json").json
    assert contents(work) == before
    assert "would free 3.0 MB" in cli("clean", "--work-dir", work, "--dry-run").out
    assert {**dry, "dry_run": False} == cli("clean", "--work-dir", work, "--json").json


def test_younger_stages_stay(cli: Any, work: Path) -> None:
    old = time.time() - 10 * DAY
    for path in [work / "stages" / "search" / KEY, *(work / "stages" / "search" / KEY).iterdir()]:
        os.utime(path, (old, old))
    assert [row["kind"] for row in removed(cli, work, 11)] == ["leftover"]
    assert removed(cli, work, 9.5) == [{"stage": "search", "kind": "finished", "folders": 1}]
    assert StageStore(work).find("search", KEY) is None
    assert StageStore(work).find("search", OTHER) is not None
    assert (work / "scratch" / "search" / ("2" * 64) / "scores.json").is_file()


def removed(cli: Any, work: Path, days: float) -> list[dict[str, Any]]:
    rows = cli("clean", "--work-dir", work, "--older-than", days, "--json").json["removed"]
    return [{name: value for name, value in row.items() if name != "bytes"} for row in rows]


def test_what_a_bundle_shares_frees_nothing_and_stays_there(cli: Any, work: Path, tmp_path: Path) -> None:
    plan = work / "stages" / "export" / KEY / "data"
    place(plan, tmp_path / "bundle" / "plan")
    if plan.stat().st_nlink == 1:
        pytest.skip("no hard links here")
    rows = cli("clean", "--work-dir", work, "--json").json["removed"]
    assert rows[0]["bytes"] < 3_000_000
    assert (tmp_path / "bundle" / "plan").stat().st_size == 3_000_000


def test_a_running_build_is_not_disturbed(cli: Any, work: Path) -> None:
    before = contents(work)
    with StageStore(work).lock(sweep=False):
        for more in ((), ("--dry-run",)):
            done = cli("clean", "--work-dir", work, *more)
            assert (done.code, done.out) == (2, "")
            assert "another command is using the work folder" in done.err
    assert contents(work) == before


def test_a_living_temporary_folder_stays(cli: Any, work: Path) -> None:
    with StageStore(work).write("export", OTHER) as folder:
        assert cli("clean", "--work-dir", work, "--json").json["removed"][-1]["folders"] == 1
        assert folder.is_dir()


def add_file(work: Path) -> str:
    (work / "notes.txt").write_text("mine")
    return "notes.txt"


def add_stage_file(work: Path) -> str:
    (work / "stages" / "notes.txt").write_text("mine")
    return "notes.txt"


def add_key(work: Path) -> str:
    (work / "stages" / "search" / "mine").mkdir()
    return "mine"


def link_key(work: Path) -> str:
    (work.parent / "mine").mkdir()
    (work / "scratch" / "search" / ("5" * 64)).symlink_to(work.parent / "mine")
    return "5" * 64


def link_stages(work: Path) -> str:
    (work / "stages").rename(work.parent / "mine")
    (work / "stages").symlink_to(work.parent / "mine")
    return "stages"


def lock_folder(work: Path) -> str:
    (work / "lock").unlink(missing_ok=True)
    (work / "lock").mkdir()
    return "lock"


@pytest.mark.parametrize("spoil", [add_file, add_stage_file, add_key, link_key, link_stages, lock_folder])
def test_a_folder_that_holds_anything_else_is_refused_and_left_alone(
    cli: Any, work: Path, spoil: Callable[[Path], str]
) -> None:
    name = spoil(work)
    before = contents(work.parent)
    done = cli("clean", "--work-dir", work)
    assert (done.code, done.out) == (2, "")
    assert name in done.err
    assert "nothing was removed" in done.err
    assert contents(work.parent) == before


def test_other_folders_are_refused_and_left_alone(cli: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    before = contents(tiny_folder)
    for folder in (tmp_path / "gone", tmp_path / "empty", tmp_path / "file", tiny_folder):
        done = cli("clean", "--work-dir", folder)
        assert (done.code, done.out) == (2, "")
        assert str(folder) in done.err
    assert list((tmp_path / "empty").iterdir()) == []
    assert contents(tiny_folder) == before


def test_the_work_folder_of_a_build_is_emptied_and_its_bundle_stays(cli: Any, tiny_bundle: Any, tmp_path: Path) -> None:
    work = Path(shutil.copytree(tiny_bundle.work, tmp_path / "work"))
    stages = {path.name for path in (work / "stages").iterdir()}
    rows = cli("clean", "--work-dir", work, "--json").json["removed"]
    assert {row["stage"] for row in rows if row["kind"] == "finished"} == stages
    assert file_bytes(work) == 0
    assert cli("verify", tiny_bundle.bundle).code == 0


def test_it_loads_no_torch(python: Callable[..., subprocess.CompletedProcess[str]], work: Path) -> None:
    code = (
        "import sys\n"
        "from cushion_deploy.cli.main import run\n"
        "code = run(sys.argv[1:])\n"
        "sys.exit(code or len({'torch', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    )
    done = python(code, "clean", "--work-dir", work)
    assert (done.returncode, done.stderr) == (0, "")
