"""`bench/without_vnni.c` turns this processor into one that saturates, and sessions then take the exact kernels."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPUINFO = Path("/proc/cpuinfo")
QUESTION = """
import json
from cushion_deploy.engines.onnxruntime.kernels import UINT8_WEIGHTS, adds_exactly, exact_kernels
print(json.dumps([adds_exactly("0"), adds_exactly("1"), exact_kernels()[UINT8_WEIGHTS]]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the compiled library."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if platform.machine() != "x86_64" or not CPUINFO.is_file() or "cpuid_fault" not in CPUINFO.read_text().split():
        pytest.skip("CPUID cannot be made to fault on this machine")
    if compiler is None:
        pytest.skip("there is no C compiler")
    path = tmp_path_factory.mktemp("library") / "without_vnni.so"
    command = [compiler, "-Wall", "-Werror", "-O2", "-shared", "-fPIC", "-o", str(path)]
    subprocess.run([*command, str(ROOT / "bench" / "without_vnni.c")], check=True, timeout=60)
    return path


def test_sums_of_int8_weights_saturate_without_vnni_and_sessions_avoid_them(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", QUESTION],
        env=os.environ | {"LD_PRELOAD": str(library), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert json.loads(done.stdout) == [False, True, "1"]


def test_a_crash_of_the_program_itself_stays_a_crash(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.string_at(0)"],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode < 0
