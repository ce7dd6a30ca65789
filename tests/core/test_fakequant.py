"""The rounding rule against closed forms and against onnx's own QuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from cushion_deploy.core.fakequant import (
    asymmetric_range,
    dequantize,
    dequantize_asymmetric,
    qmax,
    quantize,
    quantize_asymmetric,
    quantize_weight,
    spread,
    symmetric_scale,
)
from cushion_deploy.errors import ExitCode, UsageError

FLOATS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-10, 2.0**10, width=32)
INT8_ZERO = np.int8(0)


def onnx_node(op: str, x: np.ndarray, scale: np.ndarray, zero: np.generic = INT8_ZERO) -> np.ndarray:
    code = TensorProto.INT8 if zero.dtype == np.int8 else TensorProto.UINT8
    kind = TensorProto.FLOAT if op == "QuantizeLinear" else code
    node = helper.make_node(op, ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", kind, None),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("zero", code, None),
        ],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    assert isinstance(model, onnx.ModelProto)
    return ReferenceEvaluator(model).run(None, {"x": x, "scale": scale, "zero": zero})[0]


def test_halves_go_to_the_even_code() -> None:
    halves = np.arange(-4, 5, dtype=np.float32) + np.float32(0.5)
    assert quantize(halves, 1.0).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4, 4]


def test_codes_saturate_at_both_ends_of_int8() -> None:
    x = np.array([-np.inf, -1e30, -129, -128.5, -128, 127, 127.5, 128, 1e30, np.inf], dtype=np.float32)
    assert quantize(x, 1.0).tolist() == [-128, -128, -128, -128, -128, 127, 127, 127, 127, 127]


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (6, 31), (4, 7)])
def test_the_largest_code_leaves_room_for_one_more_negative_one(bits: int, largest: int) -> None:
    assert qmax(bits) == largest
    ends = np.array([-1e9, 1e9], dtype=np.float32)
    assert quantize(ends, 1.0, bits).tolist() == [-largest - 1, largest]


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS), SCALES)
def test_codes_are_those_of_onnx_quantize_linear(x: np.ndarray, scale: float) -> None:
    codes = quantize(x, scale)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, onnx_node("QuantizeLinear", x, np.float32(scale)))


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.int8, (3, 4)), SCALES)
def test_values_are_those_of_onnx_dequantize_linear(codes: np.ndarray, scale: float) -> None:
    values = dequantize(codes, scale)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, onnx_node("DequantizeLinear", codes, np.float32(scale)))


@settings(deadline=None, derandomize=True)
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_scale_maps_the_maximum_to_the_largest_code(amax: float) -> None:
    scale = symmetric_scale(amax)
    assert scale == float(np.float32(scale)), "a float32 value"
    assert scale == pytest.approx(amax / 127, rel=2e-7)
    assert quantize(np.array([amax, -amax], dtype=np.float32), scale).tolist() == [127, -127]


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 8)), elements=FLOATS))
def test_a_weight_comes_back_within_half_a_step_of_its_own_channel(weight: np.ndarray) -> None:
    codes, scale = quantize_weight(weight, "w")
    assert (codes.shape, scale.shape, scale.dtype) == (weight.shape, weight.shape[:1], np.float32)
    live = np.abs(weight).max(axis=1) / 127 >= np.finfo(np.float32).tiny
    expected = np.where(live, np.abs(weight.astype(np.float64)).max(axis=1) / 127, 1.0)
    np.testing.assert_allclose(scale, expected, rtol=2e-7)
    error = np.abs(codes * scale[:, None].astype(np.float64) - weight)
    assert (error <= scale[:, None] * 0.500001).all()


def test_a_channel_of_zeros_or_of_next_to_nothing_gets_scale_one_and_codes_zero() -> None:
    weight = np.array([[0.0, 0.0], [1e-40, -1e-40], [0.5, -1.0]], dtype=np.float32)
    codes, scale = quantize_weight(weight, "w")
    assert scale.tolist() == [1.0, 1.0, float(np.float32(1.0) / np.float32(127))]
    assert codes.tolist() == [[0, 0], [0, 0], [64, -127]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    weight = np.ones((2, 2), dtype=np.float32)
    weight[1, 0] = bad
    with pytest.raises(UsageError, match=r"layers\.0\.mlp\.down") as e:
        quantize_weight(weight, "layers.0.mlp.down[0]")
    assert e.value.exit_code == ExitCode.USAGE
    assert "fetch" in e.value.hint


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS), SCALES, st.integers(0, 255))
def test_asymmetric_codes_and_values_are_those_of_onnx(x: np.ndarray, scale: float, zero: int) -> None:
    codes = quantize_asymmetric(x, scale, zero)
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, onnx_node("QuantizeLinear", x, np.float32(scale), np.uint8(zero)))
    values = dequantize_asymmetric(codes, scale, zero)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, onnx_node("DequantizeLinear", codes, np.float32(scale), np.uint8(zero)))


@pytest.mark.parametrize("bits", [8, 6, 4])
@settings(deadline=None, derandomize=True)
@given(data=st.data())
def test_an_asymmetric_grid_spans_minimum_zero_and_maximum(bits: int, data: st.DataObject) -> None:
    bound = st.floats(-(2.0**30), 2.0**30, width=32)
    low, high = sorted(data.draw(st.tuples(bound, bound)))
    least, most = min(low, 0.0), max(high, 0.0)
    scale, zero = asymmetric_range(low, high, bits)
    assert type(zero) is int
    assert 0 <= zero <= 2**bits - 1
    assert scale == float(np.float32(scale)), "a float32 value"
    if scale < np.finfo(np.float32).tiny:
        assert most - least < 2.0**-117
        return
    assert scale == pytest.approx((most - least) / (2**bits - 1), rel=1e-6)
    ends = np.array([least, 0.0, most, -np.inf, np.inf], dtype=np.float32)
    codes = quantize_asymmetric(ends, scale, zero, bits)
    values = dequantize_asymmetric(codes, scale, zero).astype(np.float64)
    assert values[1] == 0.0, "zero is a code"
    assert codes[3:].tolist() == [0, 2**bits - 1], "saturated"
    # Rounding the zero point shifts the grid by up to half a step.
    assert np.abs(values[[0, 2]] - [least, most]).max() <= scale * 0.5001


def test_asymmetric_halves_go_to_the_even_code_before_the_zero_point_is_added() -> None:
    halves = np.array([-1.5, -0.5, 0.5, 1.5, 2.5], dtype=np.float32)
    assert quantize_asymmetric(halves, 1.0, 3).tolist() == [1, 3, 3, 5, 5]


@pytest.mark.parametrize("bits", [8, 6, 4])
@settings(deadline=None, derandomize=True)
@given(
    weight=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 11)), elements=FLOATS),
    group=st.integers(0, 12),
)
def test_every_group_of_a_weight_has_its_own_scale(bits: int, weight: np.ndarray, group: int) -> None:
    codes, scale = quantize_weight(weight, "w", bits, group)
    (rows, columns), limit = weight.shape, 2 ** (bits - 1) - 1
    size = group or columns
    starts = range(0, columns, size)
    assert codes.dtype == np.int8
    assert scale.shape == ((rows, len(starts)) if group else (rows,))
    back = dequantize(codes, spread(scale, columns, group))
    for row in range(rows):
        for i, start in enumerate(starts):
            part = weight[row, start : start + size]
            step = np.float32(np.abs(part).max()) / np.float32(limit)
            step = np.float32(1.0) if step < np.finfo(np.float32).tiny else step
            assert (scale[row, i] if group else scale[row]) == step
            expected = [max(-limit - 1, min(limit, round(float(v / step)))) for v in part]
            assert codes[row, start : start + size].tolist() == expected
            np.testing.assert_array_equal(back[row, start : start + size], np.array(expected, np.float32) * step)
