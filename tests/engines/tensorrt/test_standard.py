"""Standard TensorRT compiles by the same code as TensorRT-RTX; its library is a stand-in around the real builder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
from random_llama import LAYERS, LIMITS, edited, scale_the_contracting_axis

from cushion_deploy.core.graphs import ExportedGraph
from cushion_deploy.engines.tensorrt.engine import TensorRt
from cushion_deploy.errors import CheckFailed


def test_standard_tensorrt_is_built_by_the_same_code_and_counted_by_the_inspector(
    rtx: TensorRt, standard: TensorRt, graph: ExportedGraph, tmp_path: Path
) -> None:
    for name in ("rtx", "standard"):
        (tmp_path / name).mkdir()
    found = standard.compile(graph, tmp_path / "standard", dataclasses.replace(LIMITS, targets=()))
    assert sorted(os.listdir(tmp_path / "standard")) == ["engine.json", "sm86.engine"]
    assert (found.engine, found.targets, found.int8_linears) == ("tensorrt", ("sm86",), 7 * LAYERS + 1)
    assert found.versions["tensorrt"] == "11.0.0.99"
    # Listing and inspector are two accounts of one build: every count is the same.
    ahead = rtx.compile(graph, tmp_path / "rtx", LIMITS)
    for count in ("kernels", "int8_gemms", "moves", "half_accumulators", "attention_matmuls", "unknown_gemms"):
        assert found.details[count] == ahead.details[count], count
    assert found.fused_attention == ahead.fused_attention == LAYERS
    assert found.details["command"].startswith("trtexec ")


def test_standard_tensorrt_fails_where_int8_was_lost(standard: TensorRt, graph: ExportedGraph, tmp_path: Path) -> None:
    broken = edited(graph, tmp_path, scale_the_contracting_axis)
    with pytest.raises(CheckFailed, match=r"13 of 15 linears .*gate_up.*contracting axis 0"):
        standard.compile(broken, tmp_path, dataclasses.replace(LIMITS, targets=()))
    assert not list(tmp_path.glob("*.engine"))
