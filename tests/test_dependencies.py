"""Versions of other packages: one that is too old is named, with the command that installs another, before any work."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement

from cushion_deploy.cli.main import VERBS, run
from cushion_deploy.dependencies import EXTRAS_OF
from cushion_deploy.engines.openvino.library import import_openvino
from cushion_deploy.errors import ExitCode, MissingDependency

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that writes what pip records about an installed package, which is found before all others."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def record(name: str, version: str, *requires: str, extras: Iterable[str] = ()) -> None:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.4", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join([*lines, *(f"Provides-Extra: {extra}" for extra in extras)]) + "\n")

    return record


def of_project() -> list[str]:
    """Return the requirements of the project as its metadata has them: an extra is one more condition of a marker."""
    found = list(PROJECT["dependencies"])
    for extra, lines in PROJECT["optional-dependencies"].items():
        for requirement in map(Requirement, lines):
            marker = f"({requirement.marker}) and " if requirement.marker else ""
            requirement.marker = Marker(f"{marker}extra == '{extra}'")
            found.append(str(requirement))
    return found


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


def test_the_doctor_reports_a_package_that_is_too_old(install: Install, capsys: pytest.CaptureFixture[str]) -> None:
    install("cushion-deploy", "9.9", *of_project(), extras=PROJECT["optional-dependencies"])
    install("transformers", "5.0.0")
    assert run(["doctor"]) == ExitCode.OK
    assert "(found 5.0.0)" in capsys.readouterr().out
    assert run(["doctor", "nowhere"]) == ExitCode.MISSING


def test_the_library_of_an_engine_is_checked_where_it_is_loaded(install: Install, tmp_path: Path) -> None:
    install("cushion-deploy", "9.9", *of_project())
    install("openvino", "2025.1.0")
    # ONNX Runtime needs none.
    assert run(["generate", str(tmp_path / "nowhere"), "text"]) == ExitCode.USAGE
    with pytest.raises(MissingDependency, match=r"openvino 2025\.1\.0 is installed"):
        import_openvino.__wrapped__()


def test_a_bundle_is_not_signed_with_a_library_that_is_too_old(install: Install, tmp_path: Path) -> None:
    install("cushion-deploy", "9.9", *of_project())
    install("model-signing", "1.0.1")
    assert run(["sign", str(tmp_path), "--key", "private.pem"]) == ExitCode.MISSING


@pytest.mark.parametrize(("version", "code"), [("2.13.0+cpu", ExitCode.OK), ("2.1.0+cpu", ExitCode.MISSING)])
def test_a_build_for_an_accelerator_is_that_version(install: Install, version: str, code: int) -> None:
    install("cushion-deploy", "9.9", "torch>=2.8 ; extra == 'build'")
    install("torch", version)
    assert run(["build", "--print-config"]) == code


def test_the_table_names_commands_and_extras_that_exist() -> None:
    assert set(EXTRAS_OF) <= set(VERBS)
    assert {extra for extras in EXTRAS_OF.values() for extra in extras} <= set(PROJECT["optional-dependencies"])
