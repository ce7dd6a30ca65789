"""Several processes share the work of search, calibrate and eval, and find to the last bit what one process finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SETTINGS = (
    *("--set", "search.text_tokens=64", "--set", "calibration.windows=10", "--set", "calibration.window=48"),
    *("--set", "search.batch_positions=256", "--quiet"),
)
SMALL_CHUNKS = """
import sys
from cushion_deploy.cli.main import main
from cushion_deploy.prefix import search
search.SCAN_CHUNK = 32
main(sys.argv[1:])
"""


def start(folder: Path, processes: int, program: Sequence[str], *arguments: object) -> subprocess.Popen[str]:
    """Start a program in a folder: alone, or in several processes of torchrun."""
    folder.mkdir(exist_ok=True)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    line = [sys.executable, *(torchrun if processes > 1 else ()), *program, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        line, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finished(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, output and errors of a process, once it has ended."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def text_file(folder: Path) -> Path:
    """Return a file of text in which no absorber of the planted model stands."""
    file = folder / "text.txt"
    file.write_text("The quick brown fox jumps over the lazy dog; the dog sleeps, and the fox is gone. " * 40)
    return file


def test_calibrate_in_two_processes_writes_the_files_of_one(planted_folder: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    arguments = ("calibrate", "--model", planted_folder, "--calib-data", text, *SETTINGS)
    processes = [start(tmp_path / str(n), n, ("-m", "cushion_deploy"), *arguments) for n in (1, 2)]
    results = [finished(process) for process in processes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert results[0][1] == results[1][1], "the first process prints, and only it"
    for name in ("scales.json", "smoothing.safetensors"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    facts = [
        json.loads(next((tmp_path / str(n) / ".cushion-work" / "stages" / "search").glob("*/stage.json")).read_text())
        for n in (1, 2)
    ]
    assert facts[0]["key"] == facts[1]["key"]
    assert facts[1]["facts"]["ran_on"] == "cpu, float32, 2 processes"
    found = [
        next((tmp_path / str(n) / ".cushion-work" / "stages" / "search").glob("*/prefix.safetensors")) for n in (1, 2)
    ]
    assert found[0].read_bytes() == found[1].read_bytes()


def test_eval_in_two_processes_prints_the_losses_of_one(planted_folder: Path, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    arguments = ("eval", planted_folder, "--data", text, "--window", 64, "--max-tokens", 448, "--json", "--quiet")
    results = [finished(start(tmp_path / str(n), n, ("-m", "cushion_deploy"), *arguments)) for n in (1, 2)]
    assert [code for code, _, _ in results] == [0, 0], results
    one, two = (json.loads(out) for _, out, _ in results)
    assert one["texts"] == two["texts"]


def test_eval_of_a_bundle_in_two_processes_runs_its_engine_once(planted_bundle: Any, tmp_path: Path) -> None:
    text = text_file(tmp_path)
    arguments = (
        "eval",
        planted_bundle.bundle,
        "--data",
        text,
        "--window",
        64,
        "--max-tokens",
        192,
        "--json",
        "--quiet",
    )
    results = [finished(start(tmp_path / str(n), n, ("-m", "cushion_deploy"), *arguments)) for n in (1, 2)]
    assert [code for code, _, _ in results] == [0, 0], results
    one, two = (json.loads(out) for _, out, _ in results)
    assert one["columns"] == ["fp", "fp-prefix", "quantized", "quantized-prefix", "engine"]
    assert one["texts"] == two["texts"]
    assert one["agreement"] == two["agreement"]


def test_a_scan_that_was_killed_in_two_processes_goes_on_in_one(planted_folder: Path, tmp_path: Path) -> None:
    text, program = text_file(tmp_path), tmp_path / "chunks.py"
    program.write_text(SMALL_CHUNKS)
    arguments = ("search", "--model", planted_folder, "--calib-data", text, *SETTINGS, "--exhaustive", "--json")
    whole = finished(start(tmp_path / "whole", 1, (str(program),), *arguments))
    assert whole[0] == 0, whole
    killed = start(tmp_path / "killed", 2, (str(program),), *arguments)
    scratch = tmp_path / "killed" / ".cushion-work" / "scratch" / "search"
    deadline = time.monotonic() + 120
    while not list(scratch.glob("*/scan-0.json")) and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.002)
    killed.send_signal(signal.SIGTERM)
    finished(killed)
    (checkpoint,) = scratch.glob("*/scan-0.json")
    done = len(json.loads(checkpoint.read_text())["scores"])
    assert 0 < done < 320, "killed in the middle"
    resumed = finished(start(tmp_path / "killed", 1, (str(program),), *arguments))
    assert resumed[0] == 0, resumed
    one, other = (json.loads(result[1]) for result in (whole, resumed))
    assert one["token_ids"] == other["token_ids"]
    assert [step["top"] for step in one["steps"]] == [step["top"] for step in other["steps"]]
    assert one["positions_scored"] == other["positions_scored"]


@pytest.mark.parametrize("command", ["build", "tune"])
def test_other_commands_refuse_several_processes(command: str, planted_folder: Path, tmp_path: Path) -> None:
    arguments = (command, "--model", planted_folder, "--quiet", "-o", tmp_path / "out")
    code, out, err = finished(start(tmp_path / "work", 2, ("-m", "cushion_deploy"), *arguments))
    assert code != 0
    assert f"'{command}' runs in one process" in err
    assert "search, calibrate and eval" in err
    assert out == ""
