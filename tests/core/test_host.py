"""What the machine has, against /proc and against processes that allocate a known amount of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cushion_deploy.core.host import cpu_description, free_memory, installed_versions

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
LARGE = 400 * MIB

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def run(code: str) -> list[int]:
    """Return the numbers that a fresh Python process prints."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    return [int(number) for number in done.stdout.split()]


@linux_only
def test_free_memory_is_what_the_kernel_calls_available() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    assert abs(free_memory() - sizes["MemAvailable"]) < 0.25 * sizes["MemTotal"]


def test_peak_memory_counts_what_was_freed_again() -> None:
    code = f"""
from cushion_deploy.core.host import own_peak_memory, peak_memory
before = own_peak_memory()
block = b"x" * {LARGE}
del block
print(before, own_peak_memory(), peak_memory())
"""
    before, own, peak = run(code)
    assert before < LARGE
    assert LARGE <= own - before + 32 * MIB < LARGE + 128 * MIB
    assert peak >= own


def test_peak_memory_counts_a_child_that_has_ended() -> None:
    code = f"""
import subprocess, sys
from cushion_deploy.core.host import own_peak_memory, peak_memory
subprocess.run([sys.executable, "-c", "x = b'x' * {LARGE}"], check=True)
print(own_peak_memory(), peak_memory())
"""
    own, peak = run(code)
    assert own < LARGE <= peak < 2 * LARGE


@linux_only
def test_own_peak_memory_excludes_the_process_that_started_it() -> None:
    block = np.ones(LARGE, np.uint8)
    (own,) = run("from cushion_deploy.core.host import own_peak_memory; print(own_peak_memory())")
    assert own < block.nbytes // 2


@linux_only
def test_the_processor_is_the_one_that_the_kernel_names() -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name, _, cores = cpu_description().rpartition(", ")
    assert cores == f"{sum(line.startswith('processor') for line in lines)} cores"
    if any(line.startswith("model name") for line in lines):
        assert any(line.endswith(f": {name}") for line in lines)


def test_versions_are_those_of_what_is_installed() -> None:
    assert installed_versions(["numpy", "no-such-distribution"]) == {"numpy": np.__version__}
