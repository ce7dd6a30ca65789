"""A sample of ``bench/trust.py``: builds that are stopped or raced, flipped bits and mutated inputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")
def test_a_sample_of_every_fault_that_needs_no_root_leaves_nothing_corrupt() -> None:
    command = [sys.executable, "bench/trust.py", "signal", "race", "flip", "mutate", "--share", "0.002", "--seed", "7"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    kinds = json.loads(found.stdout)["kinds"]
    assert kinds["signal"]["tried"] == {"SIGINT": 1, "SIGTERM": 1}
    assert sum(kinds["race"]["tried"].values()) == 1
    assert sum(kinds["flip"]["tried"].values()) == 4
    assert len(kinds["mutate"]["tried"]) == 10
