"""The rule standard-operators refuses a foreign domain or a rejected operator."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper
from small_graph import QKV, Edit, assert_broken, node


def foreign(model: onnx.ModelProto) -> None:
    node(model, "softmax").domain = "com.microsoft"


def integer_matmul(model: onnx.ModelProto) -> None:
    codes, weight = f"{QKV}.codes", f"{QKV}.weight_codes"
    model.graph.node.append(helper.make_node("MatMulInteger", [codes, weight], ["i"], "integer"))


def dynamic(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "dynamic"))


BROKEN: list[tuple[str, Edit]] = [
    ("softmax: is com.microsoft::Softmax", foreign),
    ("integer: is MatMulInteger", integer_matmul),
    ("dynamic: is DynamicQuantizeLinear", dynamic),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("standard-operators", words, damage)
