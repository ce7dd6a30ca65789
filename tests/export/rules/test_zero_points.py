"""The rule zero-points refuses a zero point that is missing, unsigned or not 0."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from small_graph import HEAD, OUT, QKV, Edit, assert_broken, node, put


def unsigned(model: onnx.ModelProto) -> None:
    put(model, f"{QKV}.zero", np.array(0, np.uint8))


def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model, f"{QKV}/Q").input[2]


BROKEN: list[tuple[str, Edit]] = [
    (f"{QKV}/Q: has a zero point other than 0", lambda m: put(m, f"{QKV}.zero", np.array(-3, np.int8))),
    (f"{QKV}/DQ: has a zero point of type UINT8", unsigned),
    (f"{QKV}/Q: has no zero point", no_zero_point),
    (
        f"{HEAD}/weight_DQ: has a zero point other than 0 (up to 128",
        lambda m: put(m, f"{HEAD}.weight_zeros", np.array([0] * (OUT - 1) + [-128], np.int8)),
    ),
]


@pytest.mark.parametrize(("words", "damage"), BROKEN)
def test_a_violation_names_node_and_remedy(words: str, damage: Edit) -> None:
    assert_broken("zero-points", words, damage)
