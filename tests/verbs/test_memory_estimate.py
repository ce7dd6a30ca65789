"""The memory that the doctor estimates is what a build of a model of a few hundred megabytes really takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 10,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "initializer_range": 0.02,
    "max_position_embeddings": 1024,
}
SETTINGS = ("calibration.windows=4", "evaluation.max_tokens=512", "search.enabled=false", "engines=[onnxruntime]")


def command(*arguments: object) -> str:
    """Run a command of the project in a process of its own, and return what it prints."""
    line = [sys.executable, "-m", "cushion_deploy", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_peak_of_a_build_is_within_20_percent_of_the_estimate(tiny_writer: Any, tmp_path: Path) -> None:
    folder = tiny_writer(tmp_path / "model", None, "llama", **SHAPE)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone. " * 200)
    shared = ("--calib-data", text, "--work-dir", tmp_path / "work", "--quiet", "--json")
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    estimated = json.loads(command("doctor", folder, *shared, *settings))["needs"]["memory"]
    built = command("build", "--model", folder, *shared, *settings, "-o", tmp_path / "bundle")
    measured = json.loads(built)["environment"]["peak_rss_bytes"]
    assert measured > 8e8
    assert estimated == pytest.approx(measured, rel=0.2)
