"""The wheel: one package, every module importable from it, its template inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
REGISTER = "optimum/commands/register/register_cushion.py"
"""Registers `optimum-cli export cushion`, in a namespace package that optimum shares with other distributions."""

WALK = """
import importlib, pkgutil, sys
import cushion_deploy
from cushion_deploy.errors import MissingDependency
names = [m.name for m in pkgutil.walk_packages(cushion_deploy.__path__, "cushion_deploy.")]
for name in names:
    if name.endswith("__main__"):
        continue
    try:
        importlib.import_module(name)
    except MissingDependency as e:
        # An adapter to an extra that is not installed; anything else is a fault of the wheel.
        if name != "cushion_deploy.evaluate.lm_harness":
            raise
print(cushion_deploy.__file__)
print(*names)
for name in ("export", "engines", "calib", "cli", "store", "runtime", "cushion_deploy.cushion_deploy"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    print("found", name, file=sys.stderr)
"""


def _build(kind: str, source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source, so that nothing is left in the tree."""
    for needed in ("build", "setuptools"):
        if find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("cushion_deploy", "calib", "engines", "export"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel built from the source."""
    return _build("wheel", source, tmp_path_factory.mktemp("wheel"))


def test_a_source_distribution_builds_the_same_wheel(wheel: Path, source: Path, tmp_path: Path) -> None:
    archive = _build("sdist", source, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    # In place of each symbolic link it has the folder that the link points to.
    assert not any(path.is_symlink() for path in unpacked.rglob("*"))
    again = _build("wheel", unpacked, tmp_path / "wheel")
    first, second = (
        {info.filename: info.CRC for info in zipfile.ZipFile(path).infolist() if not info.filename.endswith("RECORD")}
        for path in (wheel, again)
    )
    assert first == second


def test_it_owns_one_name_and_one_file_of_optimum_and_carries_what_is_no_python(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    names.remove(REGISTER)
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cushion_deploy"}
    assert "cushion_deploy/py.typed" in names
    render = ROOT / "cushion_deploy" / "report" / "render"
    templates = [p.name for p in render.iterdir() if p.suffix in (".j2", ".css")]
    assert len(templates) == 2
    assert {f"cushion_deploy/report/render/{t}" for t in templates} <= set(names)
    page = [
        p.name for p in (ROOT / "cushion_deploy" / "serve" / "page").iterdir() if p.suffix in (".html", ".css", ".js")
    ]
    assert len(page) == 4
    assert {f"cushion_deploy/serve/page/{name}" for name in page} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_has_every_module_of_the_source(wheel: Path) -> None:
    # Path.rglob does not follow the links of the three shared folders on every Python, os.walk does when told.
    source = {
        os.path.relpath(os.path.join(folder, file), ROOT)
        for folder, _, files in os.walk(ROOT / "cushion_deploy", followlinks=True)
        for file in files
        if file.endswith(".py") and not folder.endswith("optimum_register")
    }
    assert source | {REGISTER} == {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}


def test_installed_alone_every_module_imports_and_no_bare_name_does(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    if not python.exists():
        pytest.skip("not a POSIX virtual environment")
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(site)
    # The dependencies come from here. Path files in there are not read, so an editable install stays out.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONWARNINGS")}
    done = subprocess.run(
        [str(python), "-c", WALK], capture_output=True, text=True, cwd=tmp_path, env=clean, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "found" not in done.stderr
    where, modules = done.stdout.splitlines()
    assert Path(where).is_relative_to(site)
    assert {"cushion_deploy.export.decoder", "cushion_deploy.engines.registry", "cushion_deploy.calib.corpora"} <= set(
        modules.split()
    )
