"""Probing a library in a child process: whatever it does there is a finding, never a crash here."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest

from cushion_deploy.engines.probe import cuda_devices, how_it_ended, run_probe


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that writes an importable module and returns its name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str) -> str:
        (tmp_path / "library_under_probe.py").write_text(source)
        return "library_under_probe"

    return write


def test_a_library_that_imports_reports_its_version_past_its_own_chatter(module: Any) -> None:
    found = run_probe(module("print('hello')\n__version__ = '4.5.6'\n"))
    assert found.importable
    assert found.version == "4.5.6"
    assert found.problem == ""


def test_an_absent_library_is_a_finding() -> None:
    found = run_probe("no_such_library_anywhere")
    assert not found.importable
    assert "no_such_library_anywhere" in found.problem


def test_a_library_that_crashes_the_process_is_a_finding(module: Any) -> None:
    found = run_probe(module("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n"))
    assert not found.importable
    assert "SIGSEGV" in found.problem


def test_a_library_that_hangs_is_a_finding(module: Any) -> None:
    found = run_probe(module("import time\ntime.sleep(60)\n"), timeout=0.5)
    assert not found.importable
    assert "longer than" in found.problem


def test_the_working_folder_is_no_source_of_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "planted_library.py").write_text("__version__ = 'planted'")
    monkeypatch.chdir(tmp_path)
    assert not run_probe("planted_library").importable


def test_no_driver_means_no_device() -> None:
    assert cuda_devices("libcuda-that-does-not-exist.so") == ()


def test_devices_are_named_by_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(8, 6, b"NVIDIA GeForce RTX 3090"), (12, 0, b"NVIDIA GeForce RTX 5090")]

    class Driver:
        def __init__(self, name: str) -> None: ...

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = len(capabilities)
            return 0

        def cuDeviceGet(self, device: Any, index: int) -> int:
            device._obj.value = index
            return 0

        def cuDeviceGetName(self, buffer: Any, size: int, device: Any) -> int:
            buffer.value = capabilities[device.value][2]
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
            value._obj.value = capabilities[device.value][{75: 0, 76: 1}[attribute]]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    assert cuda_devices() == ("sm86 NVIDIA GeForce RTX 3090", "sm120 NVIDIA GeForce RTX 5090")


@pytest.mark.parametrize(
    ("code", "words"), [(3, "exit code 3"), (-9, "SIGKILL"), (-11, "SIGSEGV"), (-200, "signal 200")]
)
def test_an_exit_status_is_put_into_words(code: int, words: str) -> None:
    assert how_it_ended(code) == words
