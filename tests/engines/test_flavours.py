"""What the two flavours of TensorRT do differently, and the command lines of their tools."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.tensorrt.command_line import vendor_command
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.errors import MissingDependency, UsageError

GPU = "sm87 Orin"
SHAPES = {
    "prefill": {"input_ids": ([1, 1], [1, 16], [2, 16]), "attention_mask": ([1, 1], [1, 16], [2, 79])},
    "decode": {"input_ids": ([1, 1], [1, 1], [2, 1]), "attention_mask": ([1, 1], [1, 32], [2, 64])},
}


def test_standard_tensorrt_builds_for_the_device_here() -> None:
    assert STANDARD.choose_targets((), [GPU]) == ("sm87",)
    assert STANDARD.choose_targets(("SM87",), [GPU, "sm86 another"]) == ("sm87",)
    with pytest.raises(UsageError, match="builds for the device here alone, sm87 Orin, not for sm86") as caught:
        STANDARD.choose_targets(("sm86",), [GPU])
    assert "tensorrt-rtx" in caught.value.hint


@pytest.mark.parametrize("version", ["10.3.0", "10.13.2.6", "11.0.0.99"])
def test_versions_with_strong_typing_are_taken(version: str) -> None:
    STANDARD.require_version(version)


@pytest.mark.parametrize("version", ["10.2.0.19", "9.9"])
def test_versions_before_it_are_refused(version: str) -> None:
    with pytest.raises(MissingDependency, match=f"TensorRT {version} is older than 10.3"):
        STANDARD.require_version(version)


def graph(name: str, capacity: int = 0) -> ExportedGraph:
    contract = GraphContract(1, 1, 8, 32, 256, "float16", 0, cache_capacity=capacity)
    return ExportedGraph(
        Path(name), contract, quantized=True, sites={}, rules=(), opset=17, digest="", lineage=Lineage()
    )


def test_the_vendors_tool_is_told_the_same_plan() -> None:
    words = shlex.split(vendor_command(STANDARD, graph("float16.onnx"), "sm87.engine", ("sm87",), SHAPES))
    assert words == [
        "trtexec",
        "--onnx=float16.onnx",
        "--saveEngine=sm87.engine",
        "--profilingVerbosity=detailed",
        "--skipInference",
        "--stronglyTyped",
        "--profile=0",
        "--minShapes=input_ids:1x1,attention_mask:1x1",
        "--optShapes=input_ids:1x16,attention_mask:1x16",
        "--maxShapes=input_ids:2x16,attention_mask:2x79",
        "--profile=1",
        "--minShapes=input_ids:1x1,attention_mask:1x1",
        "--optShapes=input_ids:1x1,attention_mask:1x32",
        "--maxShapes=input_ids:2x1,attention_mask:2x64",
    ]
    ahead = shlex.split(vendor_command(RTX, graph("m.onnx"), "p", ("sm86", "sm120"), SHAPES))
    assert ahead[0] == "tensorrt_rtx"
    assert "--computeCapabilities=86,120" in ahead
    assert "--stronglyTyped" not in ahead
    # What marks the attention of a static cache has no option: no line is better than one that builds another plan.
    assert vendor_command(RTX, graph("m.onnx", capacity=64), "p", ("sm86",), SHAPES) == ""
