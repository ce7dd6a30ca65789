"""The rotation of a Site's input in the graph: a Hadamard transform in blocks, as Reshape and MatMul."""

from __future__ import annotations

import onnx_ir as ir

from cushion_deploy.core.rotation import hadamard, kronecker_factors
from cushion_deploy.export.builder import GraphBuilder


def add_rotation(g: GraphBuilder, x: ir.Value, block: int, width: int) -> ir.Value:
    """Append the rotation of ``x`` ``[batch, sequence, width]`` and return a value of the same shape and type.

    Args:
        g: the graph.
        x: input, of the graph's floating-point type.
        block: block size, a power of two that divides ``width``.
        width: features of ``x``.
    """
    inner = 1
    for order in reversed(kronecker_factors(block)):
        matrix = g.constant(hadamard(order).astype(g.dtype.numpy()), f"hadamard_{order}")
        if inner == 1:
            x = g.op("MatMul", g.op("Reshape", x, g.ints(0, 0, -1, order)), matrix, name="rotate")
        else:
            x = g.op("MatMul", matrix, g.op("Reshape", x, g.ints(0, 0, -1, order, inner)), name="rotate")
        inner *= order
    return g.op("Reshape", x, g.ints(0, 0, width))
