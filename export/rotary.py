"""Rotary position embedding as nodes of the graph.

Shapes in comments: B batch, S sequence, D head size, R rotated channels of a head.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.model_spec import RotaryScaling
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.rotary_frequencies import attention_factor, inverse_frequencies, rotated_channels


class RotaryEmbedding:
    """Rotates queries and keys by the positions of their tokens; one for all layers with the same frequencies."""

    def __init__(self, g: GraphBuilder, rotary: RotaryScaling, head_dim: int, positions: ir.Value, name: str) -> None:
        """Append the cosines and sines of positions ``[B, S]``; ``name`` is that of the stored frequencies."""
        self.g, self._size, self._rotated = g, head_dim, rotated_channels(rotary, head_dim)
        frequencies = g.constant(inverse_frequencies(rotary, head_dim), f"{name}_frequencies")
        column = g.op("Unsqueeze", g.op("Cast", positions, to=int(ir.DataType.FLOAT)), g.ints(1, 3))
        angles = g.op("Mul", column, frequencies)  # [B, 1, S, R / 2]
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
        if (scale := attention_factor(rotary)) != 1:
            factor = g.constant(np.array(scale, dtype=np.float32))
            cos, sin = g.op("Mul", cos, factor), g.op("Mul", sin, factor)
        # The sine of the first half is negative, so that rotate() needs one addition and no subtraction.
        pair = g.op("Concat", cos, cos, axis=-1), g.op("Concat", g.op("Neg", sin), sin, axis=-1)
        self._cos, self._sin = g.from_float32(pair[0]), g.from_float32(pair[1])  # [B, 1, S, R]

    def rotate(self, x: ir.Value) -> ir.Value:
        """Return ``x`` ``[B, heads, S, D]`` with the pairs ``(j, j + R / 2)`` of its first R channels rotated.

        As ``x * cos + swapped halves of x * signed sin``.
        """
        g, rotated = self.g, self._rotated
        rest: list[ir.Value] = []
        if rotated < self._size:
            x, unrotated = g.ops("Split", 2, x, g.ints(rotated, self._size - rotated), axis=-1)
            rest = [unrotated]
        half = rotated // 2
        first, second = g.ops("Split", 2, x, g.ints(half, half), axis=-1)
        swapped = g.op("Concat", second, first, axis=-1)
        total = g.op("Add", g.op("Mul", x, self._cos), g.op("Mul", swapped, self._sin))
        return g.op("Concat", total, *rest, axis=-1) if rest else total
