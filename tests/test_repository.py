"""What git tracks: nothing large, nothing half merged, and no name that a command line would take for an option."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 3_000_000


def tracked_files() -> list[str]:
    """Return the paths that git tracks; skip where this is no checkout, such as an unpacked sdist."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def test_no_tracked_file_is_large() -> None:
    sizes = {name: (ROOT / name).lstat().st_size for name in tracked_files() if os.path.lexists(ROOT / name)}
    assert "README.md" in sizes
    assert {name: size for name, size in sizes.items() if size > LARGEST_BYTES} == {}


def test_no_tracked_file_has_the_markers_of_a_merge() -> None:
    marks = tuple(mark * 7 + b" " for mark in (b"<", b">"))
    found = []
    for name in tracked_files():
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            found += [name for line in path.read_bytes().splitlines() if line.startswith(marks)]
    assert found == []


def test_no_tracked_name_reads_as_an_option() -> None:
    names = {part for name in tracked_files() for part in Path(name).parts}
    assert sorted(name for name in names if name.startswith("-")) == []


@pytest.mark.parametrize(
    ("arguments", "code", "stream", "words"),
    [
        (["--help"], 0, "stdout", "TARGET.gguf"),
        ([], 2, "stderr", "required"),
        (["--force"], 2, "stderr", "required"),
        (["model.bin"], 2, "stderr", "does not end in .gguf"),
    ],
)
def test_the_script_that_fetches_the_model_writes_nothing_without_a_target(
    arguments: list[str], code: int, stream: str, words: str, tmp_path: Path
) -> None:
    script = ROOT / "bench" / "fetch_model.py"
    done = subprocess.run([sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert words in getattr(done, stream)
    assert list(tmp_path.iterdir()) == []
