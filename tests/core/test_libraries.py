"""What is installed, and what an extra still needs, as the metadata of distributions say."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from email.message import Message
from importlib.metadata import PackageNotFoundError

import pytest

from cushion_deploy.core.libraries import LIBRARIES, library_versions, missing_of_extra

Installed = Callable[..., None]
REQUIRES = [
    "click>=8.1",
    'onnxruntime>=1.23; extra == "cpu"',
    "torch>=2.8 ; extra == 'build'",
    'onnx-ir (>=1.0) ; extra == "build"',
    'tensorrt-rtx-cu13==1.7.1.116; extra == "rtx"',
    'lm-eval<0.5,>=0.4.13; extra == "eval"',
    'uvicorn[standard]>=0.34; python_version >= "3.10" and extra == "serve"',
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Return a function that says which distributions are installed."""

    def say(**versions: str) -> None:
        known = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(name: str) -> str:
            if name not in known:
                raise PackageNotFoundError(name)
            return known[name]

        def metadata(name: str) -> Message:
            version(name)
            found = Message()
            for extra in ("cpu", "build", "rtx", "serve", "eval"):
                found["Provides-Extra"] = extra
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "metadata", metadata)
        monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)

    return say


def lacking(extra: str) -> list[str] | None:
    found = missing_of_extra(extra)
    return None if found is None else [str(each) for each in found]


def test_what_is_absent_is_missing(installed: Installed) -> None:
    installed(cushion_deploy="1", onnxruntime="1.23.0")
    assert lacking("cpu") == []
    assert lacking("build") == ["torch>=2.8", "onnx-ir>=1.0"]
    assert lacking("serve") == ["uvicorn>=0.34"]


@pytest.mark.parametrize(
    ("version", "enough"), [("2.8", True), ("2.8.0", True), ("2.13.0+cpu", True), ("3", True), ("2.7.9", False)]
)
def test_versions_are_compared_as_numbers(installed: Installed, version: str, enough: bool) -> None:
    installed(cushion_deploy="1", torch=version, onnx_ir="1.0")
    assert lacking("build") == ([] if enough else [f"torch>=2.8 (found {version})"])


def test_an_exact_version_is_exact(installed: Installed) -> None:
    installed(cushion_deploy="1", tensorrt_rtx_cu13="1.7.1.117")
    assert lacking("rtx") == ["tensorrt-rtx-cu13==1.7.1.116 (found 1.7.1.117)"]
    installed(cushion_deploy="1", tensorrt_rtx_cu13="1.7.1.116")
    assert lacking("rtx") == []


@pytest.mark.parametrize(
    ("version", "enough"), [("0.4.13", True), ("0.4.13.0", True), ("0.4.99", True), ("0.5", False), ("0.4.12", False)]
)
def test_a_version_may_also_be_too_new(installed: Installed, version: str, enough: bool) -> None:
    installed(cushion_deploy="1", lm_eval=version)
    assert lacking("eval") == ([] if enough else [f"lm-eval<0.5,>=0.4.13 (found {version})"])


def test_an_extra_that_is_not_known_is_none(installed: Installed) -> None:
    installed(cushion_deploy="1")
    assert lacking("nothing") is None
    installed()
    assert lacking("cpu") is None, "cushion-deploy itself is not installed"


def test_a_library_is_found_under_any_of_its_names(installed: Installed) -> None:
    installed(tensorrt_rtx_cu13="1.7.1.116", tensorrt_cu12="10.3.0", torch="2.8")
    found = library_versions()
    assert (found["tensorrt-rtx"], found["tensorrt"], found["torch"]) == ("1.7.1.116", "10.3.0", "2.8")
    assert set(found) == set(LIBRARIES)
    assert found["onnxruntime"] is None
