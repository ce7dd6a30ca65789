"""A checkout without symbolic links, where git writes each link as a text file, is refused in one sentence."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SENTENCE = "is a text file and not a symbolic link, because git checked the repository out without symbolic links"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a copy of the source in which each symbolic link is a file that holds its target."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("cushion_deploy", "calib", "engines", "export"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    assert links
    for link in links:
        target = os.readlink(link)
        link.unlink()
        link.write_text(target)
    return folder


@pytest.mark.parametrize("module", ["cushion_deploy", "cushion_deploy.engines.registry", "cushion_deploy.cli.main"])
def test_import_ends_in_one_sentence(checkout: Path, module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        capture_output=True,
        text=True,
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert SENTENCE in last
    assert "git config core.symlinks true" in last


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable", "build_sdist"])
def test_a_build_ends_in_one_sentence(checkout: Path, hook: str) -> None:
    if find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed")
    code = f"from setuptools.build_meta import {hook}; {hook}('dist')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=checkout)
    assert done.returncode == 1
    assert SENTENCE in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_command_that_the_sentence_gives_restores_the_links(tmp_path: Path) -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    for command in (
        ["git", "clone", "-q", "-c", "core.symlinks=false", str(ROOT), str(clone)],
        ["git", "-C", str(clone), "config", "core.symlinks", "true"],
        ["git", "-C", str(clone), "checkout", "-q", "--", "cushion_deploy"],
    ):
        assert not (clone / "cushion_deploy" / "engines").is_symlink()
        subprocess.run(command, check=True, capture_output=True)
    assert (clone / "cushion_deploy" / "engines").is_symlink()
