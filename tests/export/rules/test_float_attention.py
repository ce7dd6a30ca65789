"""The rule float-attention refuses a DQ on an input of attention."""

from __future__ import annotations

import onnx
import pytest
from onnx import helper
from small_graph import QKV, Edit, assert_broken, insert, rewire


def around(model: onnx.ModelProto, before: str, value: str, reader: str, index: int) -> None:
    s, z = f"{QKV}.scale", f"{QKV}.zero"
    insert(
        model,
        before,
        helper.make_node("QuantizeLinear", [value, s, z], ["inner.codes"], "inner_Q"),
        helper.make_node("DequantizeLinear", ["inner.codes", s, z], ["inner"], "inner_DQ"),
    )
    rewire(model, reader, index, "inner")


def dq_on_scores(model: onnx.ModelProto) -> None:
    around(model, "scores", "q", "scores", 0)


def dq_before_transpose(model: onnx.ModelProto) -> None:
    around(model, "transpose", "k", "transpose", 0)


def dq_on_softmax(model: onnx.ModelProto) -> None:
    around(model, "context", "p", "context", 0)


BROKEN: list[tuple[str, Edit]] = [
    ("scores: reads inner_DQ", dq_on_scores),
    ("scores: reads inner_DQ", dq_before_transpose),
    ("context: reads inner_DQ", dq_on_softmax),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("float-attention", words, damage)
