"""The rotation in the graph, run by ONNX Runtime, against a Kronecker power of [[1, 1], [1, -1]]."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.rotation import add_rotation


@pytest.mark.parametrize(("block", "width"), [(2, 6), (64, 192), (128, 384), (512, 1536)])
def test_blocks_of_the_last_axis_are_multiplied_by_the_hadamard_matrix(block: int, width: int) -> None:
    g = GraphBuilder(17, ir.DataType.FLOAT)
    x = g.input("x", ir.DataType.FLOAT, ["batch", "sequence", width])
    g.output(add_rotation(g, x, block, width), "y", ir.DataType.FLOAT, ["batch", "sequence", width])
    session = ort.InferenceSession(ir.to_proto(g.build("rotation")).SerializeToString())
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    values = np.random.default_rng(0).normal(size=(2, 3, width)).astype(np.float32)
    expected = (values.reshape(2, 3, -1, block) @ (matrix / np.sqrt(block))).reshape(values.shape)
    np.testing.assert_allclose(session.run(None, {"x": values})[0], expected, atol=1e-5)
