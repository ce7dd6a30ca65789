"""`bench/walls.py` counts what a token costs, and turns measured maxima into tokens per second."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.fakes.random_llama import SPEC

ROOT = Path(__file__).parents[2]
WORDS, HIDDEN, OUT = 10, 4, 6


@pytest.fixture
def walls(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the benchmark as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("walls")


def written_graph(path: Path, *, tied: bool) -> Path:
    """Write an embedding, one quantized linear and, if ``tied``, a head that reads the embedding's table."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=1),
        helper.make_node("MatMul", ["x", "weight"], ["y"]),
    ]
    if tied:
        nodes.append(helper.make_node("Gemm", ["x", "table"], ["logits"], transB=1))
    stored = {
        "table": np.zeros((WORDS, HIDDEN), np.float32),
        "codes": np.zeros((HIDDEN, OUT), np.int8),
        "scale": np.ones(OUT, np.float32),
    }
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, OUT])
    initializers = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "graph", [ids], [y], initializers)), path)
    return path


def test_a_step_reads_a_table_only_if_a_product_does(walls: Any, tmp_path: Path) -> None:
    linear = HIDDEN * OUT + 4 * OUT
    gathered = walls.Work.of(written_graph(tmp_path / "a.onnx", tied=False), SPEC)
    tied = walls.Work.of(written_graph(tmp_path / "b.onnx", tied=True), SPEC)
    assert gathered.weight_bytes == linear
    assert tied.weight_bytes == linear + 4 * WORDS * HIDDEN
    # One row times the weight: a multiplication and an addition for each of its elements.
    assert gathered.linear_operations == tied.linear_operations == 2 * HIDDEN * OUT
    keys_and_values = np.zeros((2, SPEC.num_layers, SPEC.num_kv_heads, SPEC.head_dim), np.float32)
    assert gathered.cache_bytes == keys_and_values.nbytes
    query = np.zeros((SPEC.num_layers, SPEC.num_heads, SPEC.head_dim))
    # A score and its part of the context: two products of one vector per head.
    assert gathered.attention_operations == 2 * 2 * query.size


def test_limits_are_those_of_a_count_token_by_token(walls: Any) -> None:
    work = walls.Work(weight_bytes=700, cache_bytes=3, linear_operations=40, attention_operations=8)
    measured = walls.Walls(
        read_bytes_per_second=50.0, int8_operations_per_second=20.0, float32_operations_per_second=5.0
    )
    prompt, batch = 9, 4
    limits = work.limits(measured, prompt, batch)
    step = sum([700, *[3] * (prompt * batch)]) / 50
    linears = sum(40 for _ in range(prompt * batch)) / 20
    pairs = sum(1 for query in range(prompt) for key in range(prompt) if key <= query) * batch
    assert limits["decode"] == pytest.approx(batch / step)
    assert limits["prefill_linears"] == pytest.approx(prompt * batch / linears)
    assert limits["prefill"] == pytest.approx(prompt * batch / (linears + 8 * pairs / 5))


def test_of_two_measurements_the_larger_of_each_wall_counts(walls: Any) -> None:
    assert walls.Walls(3.0, 1.0, 2.0).or_faster(walls.Walls(1.0, 4.0, 2.5)) == walls.Walls(3.0, 4.0, 2.5)


@pytest.fixture
def workload(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return how `bench/peers.py` reads a workload."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("peers")._workload


def test_a_workload_is_a_prompt_and_a_batch(workload: Any) -> None:
    assert workload("2048x8") == (2048, 8)


@pytest.mark.parametrize("text", ["512", "0x1", "512x", "ax1", "512x1x1"])
def test_anything_else_is_no_workload(workload: Any, text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        workload(text)
