"""The memory that the doctor estimates is what a build of a model of a few hundred megabytes really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = ("calibration.windows=4", "evaluation.max_tokens=512", "search.enabled=false", "engines=[onnxruntime]")


def command(*arguments: object) -> str:
    """Run a command of the project in a process of its own, and return what it prints."""
    line = [sys.executable, "-m", "cushion_deploy", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_of_a_build_is_within_20_percent_of_the_estimate(large_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone. " * 200)
    shared = ("--calib-data", text, "--work-dir", tmp_path / "work", "--quiet", "--json")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    estimated = json.loads(command("doctor", large_folder, *shared, *settings))["needs"]["memory"]
    built = command("build", "--model", large_folder, *shared, *settings, "-o", tmp_path / "bundle")
    measured = json.loads(built)["environment"]["peak_rss_bytes"]
    assert measured > 8e8
    assert estimated == pytest.approx(measured, rel=0.2)
