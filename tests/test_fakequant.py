"""The rounding rule against closed forms and against onnx's own QuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from cushion_deploy.errors import ExitCode, UsageError
from cushion_deploy.fakequant import dequantize, qmax, quantize, quantize_weight, symmetric_scale

FLOATS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-10, 2.0**10, width=32)


def onnx_node(op: str, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    kind = TensorProto.FLOAT if op == "QuantizeLinear" else TensorProto.INT8
    node = helper.make_node(op, ["x", "scale", "zero"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [
            helper.make_tensor_value_info("x", kind, None),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
            helper.make_tensor_value_info("zero", TensorProto.INT8, None),
        ],
        [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    assert isinstance(model, onnx.ModelProto)
    return ReferenceEvaluator(model).run(None, {"x": x, "scale": scale, "zero": np.int8(0)})[0]


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


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=FLOATS), SCALES)
def test_codes_are_those_of_onnx_quantize_linear(x: np.ndarray, scale: float) -> None:
    codes = quantize(x, scale)
    assert codes.dtype == np.int8
    np.testing.assert_array_equal(codes, onnx_node("QuantizeLinear", x, np.float32(scale)))


@given(hnp.arrays(np.int8, (3, 4)), SCALES)
def test_values_are_those_of_onnx_dequantize_linear(codes: np.ndarray, scale: float) -> None:
    values = dequantize(codes, scale)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values, onnx_node("DequantizeLinear", codes, np.float32(scale)))


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_scale_maps_the_maximum_to_the_largest_code(amax: float) -> None:
    scale = symmetric_scale(amax)
    assert scale == float(np.float32(scale)), "a float32 value"
    assert scale == pytest.approx(amax / 127, rel=2e-7)
    assert quantize(np.array([amax, -amax], dtype=np.float32), scale).tolist() == [127, -127]


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
