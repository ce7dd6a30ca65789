"""TensorRT as an engine: what it imports, and the errors before anything is compiled."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from random_llama import LIMITS

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.probe import Probe, child_environment
from cushion_deploy.engines.tensorrt import engine
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.errors import MissingDependency, UsageError


def test_importing_the_engine_imports_neither_the_library_nor_onnx() -> None:
    code = (
        "import sys, cushion_deploy.engines.tensorrt.engine; print([m for m in sys.modules if m in ('tensorrt_rtx', "
        "'tensorrt', 'onnx', 'onnx_ir', 'torch', 'cushion_deploy.families')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert done.stdout.strip() == "[]", done.stderr


def test_without_the_library_the_hint_is_the_install_command(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "probe", lambda module: Probe(module, problem=f"No module named '{module}'"))
    with pytest.raises(MissingDependency) as caught:
        TensorRt(RTX).compile(graph, tmp_path, LIMITS)
    assert caught.value.hint == "pip install 'cushion-deploy[rtx]'"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sm70", "unknown target 'sm70'"),
        ("sm75", "Turing"),
        ("sm87", "Jetson Orin; .*--engine tensorrt, standard TensorRT"),
        ("sm90", "Hopper.*--engine tensorrt"),
        ("sm100", "data center Blackwell.*--engine tensorrt"),
    ],
)
def test_a_target_that_cannot_be_built_lists_the_valid_ones(
    name: str, words: str, graph: ExportedGraph, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        TensorRt(RTX).compile(graph, tmp_path, dataclasses.replace(LIMITS, targets=("sm86", name)))
    assert "sm80, sm86, sm89, sm120, sm121" in caught.value.hint


def test_standard_tensorrt_needs_its_device(
    graph: ExportedGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "probe", lambda module: Probe(module, "11.0.0.99"))
    with pytest.raises(MissingDependency, match="there is none here") as caught:
        TensorRt(STANDARD).compile(graph, tmp_path, LIMITS)
    assert "--engine tensorrt-rtx" in caught.value.hint
    monkeypatch.setattr(engine, "probe", lambda module: Probe(module, "10.2.0", ("sm86 NVIDIA A10",)))
    with pytest.raises(MissingDependency, match=r"TensorRT 10\.2\.0 is older than 10\.3"):
        TensorRt(STANDARD).require()
