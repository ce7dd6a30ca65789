"""The command line of the vendor's tool that builds the same plan."""

from __future__ import annotations

import shlex
from pathlib import Path

from cushion_deploy.core.graphs import ExportedGraph, GraphContract
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.engines.tensorrt.flavours import RTX, STANDARD
from cushion_deploy.engines.tensorrt.vendor_command import vendor_command

SHAPES = {
    "prefill": {"input_ids": ([1, 1], [1, 16], [2, 16]), "attention_mask": ([1, 1], [1, 16], [2, 79])},
    "decode": {"input_ids": ([1, 1], [1, 1], [2, 1]), "attention_mask": ([1, 1], [1, 32], [2, 64])},
}


def graph(name: str, capacity: int = 0) -> ExportedGraph:
    contract = GraphContract(1, 1, 8, 32, 256, "float16", 0, cache_capacity=capacity)
    return ExportedGraph(
        Path(name), contract, quantized=True, sites={}, rules=(), opset=17, digest="", lineage=Lineage()
    )


def test_the_vendors_tool_builds_the_same_plan() -> None:
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
