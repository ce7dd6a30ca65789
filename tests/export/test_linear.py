"""A packed linear is one MatMul with the codes, scales and arithmetic that numpy gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.sites import Site
from cushion_deploy.core.weights import whole
from cushion_deploy.errors import UsageError
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import PackedLinear, add_linear

SITE = Site("layers.0.attn.qkv")


class Tensors(dict[str, FloatArray]):
    """Weights in memory."""

    def names(self) -> frozenset[str]:
        return frozenset(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        return self[name][start:stop]


def linear(*weights: np.ndarray, biases: dict[int, np.ndarray] | None = None) -> PackedLinear:
    tensors = Tensors({f"p{i}.weight": w.astype(np.float32) for i, w in enumerate(weights)})
    tensors |= {f"p{i}.bias": b.astype(np.float32) for i, b in (biases or {}).items()}
    return PackedLinear(SITE, tuple(f"p{i}" for i in range(len(weights))), tensors)


def by_hand(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes and scales of one weight ``[out, in]``, channel by channel."""
    codes, scales = [], []
    for row in weight.astype(np.float32):
        scale = np.float32(np.abs(row).max()) / np.float32(127)
        scale = scale if scale >= np.finfo(np.float32).tiny else np.float32(1)
        codes.append([max(-128, min(127, round(float(np.float32(x) / scale)))) for x in row])  # half to even
        scales.append(scale)
    return np.array(codes), np.array(scales, np.float32)


@settings(deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), outs=st.lists(st.integers(1, 5), min_size=1, max_size=3), n=st.integers(1, 9))
def test_codes_and_scales_are_those_of_each_linear_side_by_side(seed: int, outs: list[int], n: int) -> None:
    rng = np.random.default_rng(seed)
    weights = [rng.normal(size=(m, n)) * 10.0 ** rng.integers(-6, 3, (m, 1)) for m in outs]
    packed = linear(*weights)
    codes, scales = zip(*map(by_hand, weights), strict=True)
    assert packed.codes().dtype == np.int8
    assert packed.codes().shape == (n, sum(outs))
    np.testing.assert_array_equal(packed.codes(), np.concatenate(codes).T)
    np.testing.assert_array_equal(packed.scales(), np.concatenate(scales))
    np.testing.assert_array_equal(packed.weight(), np.concatenate(weights).astype(np.float32).T)
    assert packed.weight().flags.c_contiguous
    assert packed.codes().flags.c_contiguous


def test_rounding_is_half_to_even_and_no_code_is_minus_128() -> None:
    packed = linear(np.array([[-127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert packed.codes()[:, 0].tolist() == [-127, 0, 2, 2, 0, -2]
    assert packed.scales().tolist() == [1.0]


def test_a_dead_channel_has_zero_codes_and_a_scale_that_engines_accept() -> None:
    packed = linear(np.array([[0.0, 0.0], [1e-39, -1e-39], [1.0, 2.0]]))
    assert packed.scales()[:2].tolist() == [1.0, 1.0]
    assert not packed.codes()[:, :2].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_damaged_weight_is_refused_by_name(bad: float) -> None:
    with pytest.raises(UsageError, match="p1") as caught:
        linear(np.ones((2, 2)), np.array([[1.0, bad]])).codes()
    assert caught.value.hint


def test_a_missing_bias_among_packed_linears_is_zero() -> None:
    some = linear(np.ones((2, 3)), np.ones((1, 3)), np.ones((2, 3)), biases={1: np.array([4.0]), 2: np.array([5, 6])})
    assert some.has_bias
    assert some.bias().tolist() == [0, 0, 4, 5, 6]
    assert not linear(np.ones((2, 3))).has_bias


def run(folder: Path, packed: PackedLinear, x: np.ndarray, dtype: ir.DataType, scale: float | None) -> np.ndarray:
    """Return what the literal graph makes of ``x``."""
    g = GraphBuilder(17, dtype)
    g.scope("test")
    value = g.input("x", dtype, ["batch", "sequence", x.shape[-1]])
    g.output(add_linear(g, value, packed, scale), "y", dtype, ["batch", "sequence", sum(packed.out_features)])
    path = folder / "linear.onnx"
    ir.save(g.build("test"), path)
    onnx.checker.check_model(path, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.astype(dtype.numpy())})
    assert y.dtype == dtype.numpy()
    return np.asarray(y, dtype=np.float64)


@pytest.mark.parametrize("scale", [None, 0.02])
@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("bias", [False, True])
def test_the_graph_computes_the_linear(scale: float | None, dtype: ir.DataType, bias: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(m, 16)) * 0.3 for m in (5, 2, 3)]
    biases = {0: rng.normal(size=5), 2: rng.normal(size=3)} if bias else {}
    x = (rng.normal(size=(2, 4, 16))).astype(dtype.numpy()).astype(np.float64)
    x[0, 0, 0] = 100.0  # saturates
    expected = []
    for i, w in enumerate(weights):
        if scale is None:
            y = x @ w.astype(dtype.numpy()).astype(np.float64).T
        else:
            codes, steps = by_hand(w)
            entering = np.clip(np.rint(x.astype(np.float32) / np.float32(scale)), -128, 127)
            y = (entering @ codes.T) * np.float64(np.float32(scale)) * steps.astype(np.float64)
        expected.append(y + biases[i] if i in biases else y)
    found = run(tmp_path, linear(*weights, biases=biases), x, dtype, scale)
    tolerance = 1e-5 if dtype == ir.DataType.FLOAT else 2e-2
    np.testing.assert_allclose(found, np.concatenate(expected, -1), atol=tolerance, rtol=tolerance)


def test_a_float16_graph_does_not_overflow_in_the_accumulator(tmp_path: Path) -> None:
    # 512 products of 127 * 127 make 8.3 million; half ends at 65504. The result itself is 512 * 0.01.
    found = run(tmp_path, linear(np.full((3, 512), 0.01)), np.ones((1, 1, 512)), ir.DataType.FLOAT16, 1 / 127)
    np.testing.assert_allclose(found, 5.12, rtol=2e-3)


def test_weights_are_made_only_when_they_are_written(tmp_path: Path) -> None:
    made: list[str] = []

    class Counting(Tensors):
        def rows(self, name: str, start: int, stop: int) -> FloatArray:
            made.append(name)
            return super().rows(name, start, stop)

    g = GraphBuilder(17)
    content = Counting({"w": np.ones((20, 20), np.float32)})
    value = g.lazy("w", ir.DataType.FLOAT, (20, 20), lambda: whole(content, "w"))
    y = g.op("MatMul", g.input("x", ir.DataType.FLOAT, ["n", 20]), value)
    g.output(y, "y", ir.DataType.FLOAT, ["n", 20])
    model = g.build("test")
    assert made == []
    ir.save(model, tmp_path / "m.onnx", external_data="m.onnx.data")
    assert made == ["w"]
    assert (tmp_path / "m.onnx.data").stat().st_size == 1600
