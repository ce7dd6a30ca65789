"""The rule activation-scales refuses a scale that is not positive, not finite, not a stored scalar, or not its Q's."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graph import QKV, Edit, assert_broken, put, rewire


def scale(value: float, name: str = f"{QKV}.scale") -> Edit:
    return lambda model: put(model, name, np.array(value, np.float32))


def computed_scale(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("asked", TensorProto.FLOAT, []))
    for name in ("Q", "DQ"):
        rewire(model, f"{QKV}/{name}", 1, "asked")


def overridable_scale(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info(f"{QKV}.scale", TensorProto.FLOAT, []))


def two_scales(model: onnx.ModelProto) -> None:
    put(model, "other", np.array(0.03, np.float32))
    rewire(model, f"{QKV}/DQ", 1, "other")


def half_scale(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.scale", np.array(0.02, np.float16))


BROKEN: list[tuple[str, Edit]] = [
    (f"{QKV}/Q: has a scale that is NaN", scale(float("nan"))),
    (f"{QKV}/Q: has a scale that is NaN or infinite", scale(float("inf"))),
    (f"{QKV}/DQ: has a scale of 0.0, which is not positive", scale(0.0)),
    (f"{QKV}/Q: has a scale of -1.0, which is not positive", scale(-1.0)),
    (f"{QKV}/Q: has a subnormal scale of 1e-39", scale(1e-39)),
    (f"{QKV}/Q: has a scale of shape [4]", lambda m: put(m, f"{QKV}.scale", np.ones(4, np.float32))),
    (f"{QKV}/Q: has a scale of type FLOAT16", half_scale),
    (f"{QKV}/Q: takes its scale from", computed_scale),
    (f"{QKV}/Q: takes its scale from", overridable_scale),
    (f"{QKV}/DQ: has another scale than {QKV}/Q", two_scales),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("activation-scales", words, damage)
