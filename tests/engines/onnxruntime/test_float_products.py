"""One rewritten linear computes what numpy does with codes, scales and float16 values."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.sites import Site
from cushion_deploy.engines.onnxruntime.float_products import multiply_in_float16
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import PackedLinear, add_linear

SITE, HALF = Site("layers.0.attn.qkv"), ir.DataType.FLOAT16


class Tensors(dict[str, FloatArray]):
    """Weights in memory."""

    def names(self) -> frozenset[str]:
        return frozenset(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self[name][start:stop]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("is_output", [False, True])
def test_codes_times_scale_are_multiplied_as_float16(with_bias: bool, is_output: bool, tmp_path: Path) -> None:
    random, scale = np.random.default_rng(0), np.float32(0.02)
    weight, bias = (random.normal(size=size).astype(np.float32) * 0.3 for size in ((6, 16), 6))
    tensors = Tensors({"p.weight": weight, **({"p.bias": bias} if with_bias else {})})
    linear = PackedLinear(SITE, ("p",), tensors)
    g = GraphBuilder(17, HALF)
    g.scope("test")
    y = add_linear(g, g.input("x", HALF, ["batch", "sequence", 16]), linear, float(scale))
    y = y if is_output else g.op("Neg", y)
    g.output(y, "y", HALF, ["batch", "sequence", 6])
    model = g.build("test")
    assert multiply_in_float16(model) == {SITE}
    ir.save(model, tmp_path / "linear.onnx")
    onnx.checker.check_model(tmp_path / "linear.onnx", full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(tmp_path / "linear.onnx", options, providers=["CPUExecutionProvider"])
    x = random.normal(size=(2, 4, 16)).astype(np.float16)
    x[0, 0, 0] = 100  # saturates
    (found,) = session.run(None, {"x": x})

    steps = np.abs(weight).max(axis=1) / np.float32(127)
    values = (np.rint(weight / steps[:, None]) * steps[:, None]).astype(np.float16).astype(np.float32)
    inputs = (np.clip(np.rint(x.astype(np.float32) / scale), -128, 127) * scale).astype(np.float16).astype(np.float32)
    expected = (inputs @ values.T).astype(np.float16)
    expected = expected + bias.astype(np.float16) if with_bias else expected
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, expected if is_output else -expected, rtol=2e-3, atol=2e-3)


def test_linears_in_floating_point_are_left_alone() -> None:
    g = GraphBuilder(17, HALF)
    linear = PackedLinear(SITE, ("p",), Tensors({"p.weight": np.ones((6, 16), np.float32)}))
    g.output(add_linear(g, g.input("x", HALF, ["b", "s", 16]), linear, None), "y", HALF, ["b", "s", 6])
    model = g.build("test")
    assert multiply_in_float16(model) == set()
    assert [node.op_type for node in model.graph] == ["MatMul"]
