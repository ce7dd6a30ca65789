"""`bench/scale.py` measures every step of a small model on the CPU, and the sink that it plants can be found."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
SMALL = {
    **{"search.text_tokens": 96, "search.random_candidates": 16, "search.screen_candidates": 8},
    **{"search.gradient_candidates": 8, "search.audit_tokens": 4, "calibration.windows": 4, "calibration.window": 64},
    **{"tuning.held_out": 2, "tuning.judge_every": 1, "tuning.batch": 2},
}
OPTIONS = ("--shape", "small", "--windows", "4", "--window", "32", "--epochs", "1")
SETTINGS = tuple(part for name, value in SMALL.items() for part in ("--set", f"{name}={value}"))
LAYERS, HIDDEN, INNER, KV = 3, 128, 192, 64


def scale(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the benchmark on one thread."""
    command = [sys.executable, str(ROOT / "bench" / "scale.py"), *OPTIONS, *SETTINGS, *map(str, arguments)]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@dataclass(frozen=True)
class Measured:
    """A finished benchmark: its result, what it showed meanwhile, and its files."""

    result: dict[str, Any]
    table: str
    folder: Path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """Return a benchmark in two parts: the model is written first, and measured by a second run."""
    folder = tmp_path_factory.mktemp("scale") / "files"
    wrote = scale("--folder", folder, "--keep", "--steps", "write")
    assert wrote.returncode == 0, wrote.stderr
    assert list(json.loads(wrote.stdout)["steps"]) == ["write"]
    done = scale("--folder", folder, "--keep", "--steps", "search,calibrate,tune,export")
    assert done.returncode == 0, done.stderr
    return Measured(json.loads(done.stdout), done.stderr, folder)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("scale")


def first_and_rest(measured: Measured, before: list[int]) -> tuple[float, float]:
    """Return the largest input of a down projection at the first token of the text, and the median of all tokens."""
    tokenizer = AutoTokenizer.from_pretrained(measured.folder / "model")
    text = tokenizer((measured.folder / "text.txt").read_text(), add_special_tokens=False)["input_ids"][:96]
    module = AutoModelForCausalLM.from_pretrained(measured.folder / "model", dtype=torch.bfloat16)
    seen: list[torch.Tensor] = []
    for layer in module.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].float().abs().amax(1)))
    with torch.inference_mode():
        module(torch.tensor([[*before, *text]]))
    largest = torch.stack(seen)[:, len(before) :].amax(dim=0)
    return float(largest[0]), float(largest.median())


def test_every_step_has_a_time_and_a_peak(measured: Measured) -> None:
    steps = measured.result["steps"]
    assert list(steps) == ["write", "search", "calibrate", "tune", "export"]
    for name, step in steps.items():
        assert step["seconds"] > 0, name
        # No process with numpy fits into less, and none of this model needs more.
        assert 30e6 < step["peak_rss_bytes"] < 8e9, name
    rows = [line.split()[0] for line in measured.table.splitlines() if line]
    assert rows == ["step", "search", "calibrate", "tune", "export"]
    assert measured.result["machine"]["cpu"]
    assert measured.result["goal"] is None


def test_the_search_finds_an_absorber(measured: Measured) -> None:
    steps = measured.result["steps"]
    absorbers, found = steps["write"]["found"]["absorbers"], steps["search"]["found"]
    assert len(found["prefix"]) == 1
    assert found["prefix"][0] in absorbers
    # The second step is skipped, because without sinks nothing is left to remove.
    assert [share < 0.5 for share in found["leaves"]] == [True]


def test_an_absorber_removes_the_planted_sink(measured: Measured) -> None:
    absorbers = measured.result["steps"]["write"]["found"]["absorbers"]
    first, median = first_and_rest(measured, [])
    assert first > 200 * median
    for absorber in absorbers:
        behind, median = first_and_rest(measured, [absorber])
        assert behind < 5 * median


def test_the_text_has_no_absorber(measured: Measured) -> None:
    found = measured.result["steps"]["write"]["found"]
    words = (measured.folder / "text.txt").read_text().split()
    # Four windows of calibration text are more than the six of the tuning.
    assert len(words) == found["text_tokens"] == 4 * 64
    assert {f"w{absorber}" for absorber in found["absorbers"]}.isdisjoint(words)


def test_the_weights_are_bfloat16_shards_of_single_layers(measured: Measured) -> None:
    shards = sorted((measured.folder / "model").glob("*.safetensors"))
    assert len(shards) == LAYERS + 2
    layer = 2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * HIDDEN * INNER + 2 * HIDDEN
    parameters = LAYERS * layer + 2 * 512 * HIDDEN + HIDDEN
    assert measured.result["steps"]["write"]["found"]["parameters"] == parameters
    header = 10_000
    assert [0 <= file.stat().st_size - 2 * layer < header for file in shards] == [False, *[True] * LAYERS, False]


def test_every_linear_of_the_graph_is_int8(measured: Measured) -> None:
    assert measured.result["steps"]["export"]["found"]["int8_linears"] == 7 * LAYERS
    graph = onnx.load(measured.folder / "graph" / "model.onnx", load_external_data=False).graph
    stored = [tensor for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    weights = sum(int(np.prod(tensor.dims)) for tensor in stored if len(tensor.dims) == 2)
    assert weights == LAYERS * (2 * HIDDEN * HIDDEN + 2 * KV * HIDDEN + 3 * HIDDEN * INNER)


def test_the_tuning_has_the_length_of_the_flags(measured: Measured) -> None:
    found = measured.result["steps"]["tune"]["found"]
    assert found["optimizer_steps"] == 2
    assert found["tuned"] <= found["untuned"]


def test_a_measured_step_is_not_measured_again(measured: Measured) -> None:
    again = scale("--folder", measured.folder, "--keep", "--steps", "tune")
    assert again.returncode == 1
    assert "already contains tune" in again.stderr
    other = scale("--folder", measured.folder, "--keep", "--steps", "tune", "--seed", "1")
    assert other.returncode == 1
    assert "other options" in other.stderr
    assert (measured.folder / "result.json").is_file()


def test_files_are_deleted_unless_kept(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    done = scale("--folder", folder, "--steps", "write")
    assert done.returncode == 0, done.stderr
    assert not folder.exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = scale("--folder", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "is not empty" in done.stderr
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_step_that_fails_ends_the_run_with_what_was_measured(tmp_path: Path) -> None:
    done = scale("--folder", tmp_path / "files", "--steps", "write,export")
    assert done.returncode == 1
    assert list(json.loads(done.stdout)["steps"]) == ["write"]
    assert "export failed" in done.stderr
    assert "prefix.safetensors" in done.stderr


@pytest.mark.parametrize(
    ("step", "seconds", "peak", "met"), [("tune", 500, 40e9, True), ("tune", 501, 1, False), ("tune", 1, 41e9, False)]
)
def test_the_goal_is_judged_by_time_and_device_memory(
    module: Any, step: str, seconds: float, peak: float, met: bool
) -> None:
    usual = {"seconds": 350.0, "peak_rss_bytes": 10**12, "peak_device_bytes": 10**9}
    steps = {name: usual for name in ("write", "search", "calibrate", "export")}
    assert module._goal(steps) is None
    goal = module._goal({**steps, step: {**usual, "seconds": seconds, "peak_device_bytes": peak}})
    assert goal["seconds"] == 700 + seconds
    assert goal["met"] is met


def test_without_a_device_the_goal_is_judged_by_the_memory_of_the_host(module: Any) -> None:
    steps = {name: {"seconds": 1.0, "peak_rss_bytes": size} for name, size in (("search", 7), ("calibrate", 9))}
    assert module._goal({**steps, "tune": {"seconds": 1.0, "peak_rss_bytes": 8}})["peak_bytes"] == 9


@pytest.mark.parametrize("step", ["search", "calibrate", "tune", "export"])
def test_the_type_of_the_graph_is_not_that_of_the_model(module: Any, step: str, tmp_path: Path) -> None:
    plain = {"folder": tmp_path, "seed": 0, "set": [], "epochs": 2, "windows": 3, "window": 4}
    given = argparse.Namespace(**plain, device="cuda:1", dtype="bf16", graph_dtype="fp16")
    found = module._arguments(given, step)
    assert found[found.index("--device") + 1] == "cuda:1"
    assert found[found.index("--dtype") + 1] == ("fp16" if step == "export" else "bf16")
    bare = module._arguments(argparse.Namespace(**plain, device=None, dtype=None, graph_dtype=None), step)
    assert not {"--device", "--dtype"} & set(bare)
