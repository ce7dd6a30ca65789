"""The rule weight-scales refuses a scale that is zero, not finite, or not per output channel."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graph import HEAD, IN, OUT, QKV, Edit, assert_broken, check, insert, node, put, rewire, whole

from cushion_deploy.errors import CheckFailed


def weight_scale(value: float) -> Edit:
    return lambda model: put(model, f"{HEAD}.weight_scales", np.array([0.01] * (OUT - 1) + [value], np.float32))


def contracting(model: onnx.ModelProto) -> None:
    node(model, f"{QKV}/weight_DQ").attribute[0].i = 0
    put(model, f"{QKV}.weight_scales", np.full(IN, 0.01, np.float32))


def negative_contracting(model: onnx.ModelProto) -> None:
    node(model, f"{QKV}/weight_DQ").attribute[0].i = -2
    put(model, f"{QKV}.weight_scales", np.full(IN, 0.01, np.float32))


BROKEN: list[tuple[str, Edit]] = [
    (f"{QKV}/weight_DQ: scales the contracting axis 0", contracting),
    (f"{QKV}/weight_DQ: scales the contracting axis 0", negative_contracting),
    (
        f"{HEAD}/weight_DQ: has 4 scales for 5 output channels",
        lambda m: put(m, f"{HEAD}.weight_scales", np.ones(OUT - 1, np.float32)),
    ),
    (
        f"{HEAD}/weight_DQ: has a scale of 0 dimensions",
        lambda m: put(m, f"{HEAD}.weight_scales", np.array(0.01, np.float32)),
    ),
    (
        f"{HEAD}/weight_DQ: has scales of type FLOAT16",
        lambda m: put(m, f"{HEAD}.weight_scales", np.ones(OUT, np.float16)),
    ),
    (f"{HEAD}/weight_DQ: has a scale that is NaN", weight_scale(float("nan"))),
    (f"{HEAD}/weight_DQ: has a scale of 0.0, which is not positive", weight_scale(0.0)),
    (f"{HEAD}/weight_DQ: has a subnormal scale", weight_scale(1e-40)),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("weight-scales", words, damage)


def test_a_gemm_scales_its_output_channels_too() -> None:
    model = whole()
    put(model, "rows_shape", np.array([-1, 2], np.int64))
    insert(model, f"{HEAD}/Q", helper.make_node("Reshape", ["context", "rows_shape"], ["flat"], "flatten"))
    rewire(model, f"{HEAD}/Q", 0, "flat")
    gemm = node(model, f"{HEAD}/MatMul")
    gemm.op_type = "Gemm"
    gemm.attribute.append(helper.make_attribute("transB", 1))
    put(model, f"{HEAD}.weight_codes", np.ones((OUT, 2), np.int8))
    node(model, f"{HEAD}/weight_DQ").attribute[0].i = 0
    del model.graph.output[0].type.tensor_type.shape.dim[0]
    onnx.checker.check_model(model, full_check=True)
    assert check(model)["weight-scales"] == 2
    node(model, f"{HEAD}/weight_DQ").attribute[0].i = 1
    put(model, f"{HEAD}.weight_scales", np.full(2, 0.01, np.float32))
    with pytest.raises(CheckFailed, match="scales the contracting axis 1"):
        check(model)
