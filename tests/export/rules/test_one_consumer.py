"""The rule one-consumer refuses a Q with more than one DQ behind it, or a DQ that feeds more than products."""

from __future__ import annotations

import onnx
import pytest
from onnx import TensorProto, helper
from small_graph import IN, QKV, Edit, assert_broken


def second_consumer(model: onnx.ModelProto) -> None:
    codes, s, z = f"{QKV}.codes", f"{QKV}.scale", f"{QKV}.zero"
    model.graph.node.append(helper.make_node("DequantizeLinear", [codes, s, z], ["again"], "second_DQ"))


def codes_are_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info(f"{QKV}.codes", TensorProto.INT8, [1, 3, IN]))


def dq_feeds_another(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Relu", [f"{QKV}.dq"], ["relu"], "relu"))


BROKEN: list[tuple[str, Edit]] = [
    (f"{QKV}/Q: has consumers DequantizeLinear, DequantizeLinear", second_consumer),
    (f"{QKV}/Q: has consumers DequantizeLinear, graph output", codes_are_output),
    (f"{QKV}/DQ: feeds Relu", dq_feeds_another),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("one-consumer", words, damage)
