"""Skips tests where OpenVINO is not installed or saturates, and runs code as on another processor."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _needs_openvino() -> None:
    pytest.importorskip("openvino", reason="openvino is not installed")


@pytest.fixture
def exact() -> None:
    """Skip a test of quantized graphs on a processor where the engine refuses to run them."""
    from cushion_deploy.engines.openvino.kernels import this_machine

    if not this_machine().exact:
        pytest.skip("OpenVINO adds INT8 products with saturation on this processor")


@pytest.fixture
def python() -> Callable[..., str]:
    """Return a function that runs code in a process of its own and returns what it prints.

    ``isa`` limits the instruction sets that OpenVINO uses there, as on an older processor.
    """

    def run(code: str, *arguments: str, isa: str = "") -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **({"ONEDNN_MAX_CPU_ISA": isa} if isa else {})}
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    return run
