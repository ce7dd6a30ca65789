"""Versions of other packages: one that is too old is named, with the command that installs another, before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cushion_deploy.cli.main import VERBS, run
from cushion_deploy.dependencies import EXTRAS_OF
from cushion_deploy.errors import ExitCode

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that writes what pip records about an installed package, which is found before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def record(name: str, version: str, *requires: str) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n")

    return record


def of_project() -> list[str]:
    """Return the requirements of the project as its metadata has them."""
    extras = PROJECT["optional-dependencies"].items()
    return [*PROJECT["dependencies"], *(f"{line} ; extra == '{extra}'" for extra, lines in extras for line in lines)]


def test_a_package_that_is_too_old_is_named_before_a_build(
    install: Install, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    install("cushion-deploy", "9.9", *of_project())
    install("onnx-ir", "1.0.0")
    assert run(["build", "--model", "nowhere", "--output", str(tmp_path / "out")]) == ExitCode.MISSING
    bound = next(str(Requirement(line).specifier) for line in of_project() if line.startswith("onnx-ir"))
    assert capsys.readouterr().err.splitlines() == [
        f"error: onnx-ir 1.0.0 is installed, and cushion-deploy needs onnx-ir{bound}",
        f"  -> pip install 'onnx-ir{bound}'",
    ]
    # Another command does not ask for what it does not use.
    assert run(["verify", str(tmp_path / "nowhere")]) == ExitCode.USAGE


@pytest.mark.parametrize(("version", "code"), [("2.13.0+cpu", ExitCode.OK), ("2.1.0+cpu", ExitCode.MISSING)])
def test_a_build_for_an_accelerator_is_that_version(install: Install, version: str, code: int) -> None:
    install("cushion-deploy", "9.9", "torch>=2.8 ; extra == 'build'")
    install("torch", version)
    assert run(["build", "--print-config"]) == code


def test_the_table_names_commands_and_extras_that_exist() -> None:
    assert set(EXTRAS_OF) <= set(VERBS)
    assert {extra for extras in EXTRAS_OF.values() for extra in extras} <= set(PROJECT["optional-dependencies"])
