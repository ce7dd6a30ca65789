"""The rule both-operands refuses a product with one operand in floating point."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from small_graph import HEAD, IN, OUT, QKV, Edit, assert_broken, put, rewire


def float_activation(model: onnx.ModelProto) -> None:
    rewire(model, f"{HEAD}/MatMul", 0, "context")


def float_weight(model: onnx.ModelProto) -> None:
    put(model, "floating", np.ones((2, OUT), np.float32))
    rewire(model, f"{HEAD}/MatMul", 1, "floating")


def unquantized_activation_codes(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("codes_in", TensorProto.INT8, [1, 3, IN]))
    rewire(model, f"{QKV}/DQ", 0, "codes_in")


BROKEN: list[tuple[str, Edit]] = [
    (f"{HEAD}/MatMul: has its first operand in floating point", float_activation),
    (f"{HEAD}/MatMul: has its second operand in floating point", float_weight),
    (f"{QKV}/MatMul: has an activation that no Q wrote", unquantized_activation_codes),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("both-operands", words, damage)
