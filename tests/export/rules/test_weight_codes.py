"""The rule weight-codes refuses a weight that is not stored as int8."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graph import HEAD, OUT, Edit, assert_broken, insert, put, rewire


def quantized_in_graph(model: onnx.ModelProto) -> None:
    put(model, "floating", np.ones((2, OUT), np.float32))
    names = [f"{HEAD}.weight_scales", f"{HEAD}.weight_zeros"]
    q = helper.make_node("QuantizeLinear", ["floating", *names], ["late"], "weight_Q", axis=1)
    insert(model, f"{HEAD}/weight_DQ", q)
    rewire(model, f"{HEAD}/weight_DQ", 0, "late")


BROKEN: list[tuple[str, Edit]] = [
    (f"{HEAD}/weight_DQ: reads a weight that is not stored", quantized_in_graph),
    (
        f"{HEAD}/weight_DQ: reads a weight of type UINT8",
        lambda m: put(m, f"{HEAD}.weight_codes", np.ones((2, OUT), np.uint8)),
    ),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("weight-codes", words, damage)
