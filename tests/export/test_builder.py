"""Constants of a graph: shared where they are equal, refused where one name would mean two values."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from cushion_deploy.export.builder import GraphBuilder


def test_equal_constants_without_a_name_are_stored_once() -> None:
    g = GraphBuilder(17)
    assert g.ints(1, 2) is g.ints(1, 2)
    assert g.int_scalar(1) is not g.ints(1), "another shape"
    assert g.scalar(1.0) is not g.int_scalar(1), "another type"


def test_a_named_constant_may_be_asked_for_again() -> None:
    g = GraphBuilder(17)
    assert g.constant(np.float32([1, np.nan]), "scale") is g.constant(np.float32([1, np.nan]), "scale")


@pytest.mark.parametrize(
    "other", [np.float32([1, 3]), np.float16([1, 2]), np.float32([[1, 2]]), np.float32([1, 2, 3])], ids=str
)
def test_a_name_is_not_given_to_another_constant(other: np.ndarray) -> None:
    g = GraphBuilder(17)
    g.constant(np.float32([1, 2]), "scale")
    with pytest.raises(ValueError, match="'scale' is in the graph already, with another value"):
        g.constant(other, "scale")


def test_a_name_is_not_given_to_another_weight() -> None:
    g = GraphBuilder(17)
    weight = g.lazy("weight", ir.DataType.FLOAT, (2, 3), lambda: np.ones((2, 3), np.float32))
    assert g.lazy("weight", ir.DataType.FLOAT, (2, 3), lambda: np.ones((2, 3), np.float32)) is weight
    for dtype, shape in ((ir.DataType.FLOAT16, (2, 3)), (ir.DataType.FLOAT, (3, 2))):
        with pytest.raises(ValueError, match="'weight' is in the graph already as"):
            g.lazy("weight", dtype, shape, lambda: np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="'weight'"):
        g.constant(np.ones((2, 3), np.float32), "weight")
