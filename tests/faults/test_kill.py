"""SIGKILL at every call that changes the disk: no half folder, and the next run goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cushion_deploy.store import StageStore, publish, staging_area, verify_bundle

DRIVER = Path(__file__).with_name("killed_everywhere.py")


def _killed(kind: str, root: Path) -> list[Path]:
    subprocess.run([sys.executable, str(DRIVER), kind, str(root)], check=True, timeout=120)
    return sorted((p for p in root.iterdir()), key=lambda p: int(p.name))


def test_a_killed_publication_leaves_a_whole_bundle_or_none_and_the_next_one_goes_on(tmp_path: Path) -> None:
    folders = _killed("publish", tmp_path)
    seen = set()
    for folder in folders:
        out = folder / "out"
        if out.exists():
            verify_bundle(out)
            text = (out / "model.onnx").read_text()
            assert (out / "report" / "report.json").read_text() == text
            seen.add(text)
        else:
            seen.add("none")
        with staging_area(out) as staged:
            # The bundle that the killed run had moved aside is back before the next build starts.
            assert set(verify_bundle(out).files) == {"model.onnx", "report/report.json"}
            (staged / "next").write_text("")
            publish(staged, out, {}, {})
        assert set(verify_bundle(out).files) == {"next"}
        assert [p.name for p in folder.iterdir()] == ["out"]
    assert seen == {"old", "none", "new"}
    assert len(folders) > 10


def test_a_killed_stage_is_whole_or_absent_its_scratch_survives_and_the_next_run_goes_on(tmp_path: Path) -> None:
    seen = set()
    phases = []
    for folder in _killed("stage", tmp_path):
        prefix = folder / "stages" / "search" / "k" / "prefix"
        done = prefix.exists() and prefix.read_text() == "new"
        phases.append((done, done != (folder / "scratch" / "search" / "k" / "scores").exists()))
        store = StageStore(folder)
        with store.lock():
            found = store.find("search", "k")
            assert list((folder / "tmp").iterdir()) == []
            assert found is None or (found / "prefix").read_text() in ("old", "new")
            seen.add((found / "prefix").read_text() if found else "none")
            with store.write("search", "k") as staged:
                (staged / "prefix").write_text("next")
        found = store.find("search", "k")
        assert found is not None
        assert (found / "prefix").read_text() == "next"
    assert seen == {"old", "none", "new"}
    # The later the kill, the further it got: no scratch, scratch, result and scratch, result alone.
    assert phases == sorted(phases)
    assert len(set(phases)) == 4
