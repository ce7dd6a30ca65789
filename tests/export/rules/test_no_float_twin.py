"""The rule no-float-twin refuses a quantized weight that is stored in floating point as well."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper
from small_graph import IN, PACKED, QKV, Edit, assert_broken, put


def twin_in_use(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.weight", np.ones((IN, PACKED), np.float32))
    model.graph.node.append(helper.make_node("MatMul", ["x", f"{QKV}.weight"], ["twin"], "twin"))


def twin_unused_transposed(model: onnx.ModelProto) -> None:
    put(model, "leftover", np.ones((PACKED, IN), np.float16))


BROKEN: list[tuple[str, Edit]] = [
    (f"initializer {QKV}.weight", twin_in_use),
    ("initializer leftover", twin_unused_transposed),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("no-float-twin", words, damage)
