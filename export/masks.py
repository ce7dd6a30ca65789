"""The additive mask of attention scores: causality, padding, sliding windows, ALiBi.

Shapes in comments: B batch, S sequence, T past + S, P prefix, L = P + T, H query heads, K key/value heads, G = H / K.
In a static cache L is its capacity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.families import Family

MASKED = {ir.DataType.FLOAT: -1e9, ir.DataType.FLOAT16: -3e4, ir.DataType.BFLOAT16: -1e9}
"""Value of masked scores: exp() of it is 0, and adding a score to it stays finite in its type."""


@dataclass(frozen=True)
class AttentionMasks:
    """Builds the additive masks of one graph: one for each window that its layers have.

    Attributes:
        g: the graph.
        spec, family: the model.
        kept: P, the length of the prefix, which lies in the first P of the L slots: in the graph or in the cache.
        grouped: whether the rows are repeated for the G query heads that share a key head.
    """

    g: GraphBuilder
    spec: ModelSpec
    family: Family
    kept: int = 0
    grouped: bool = True

    def add(self, ids: ir.Value, mask: ir.Value, write_indices: ir.Value | None = None) -> dict[int, ir.Value]:
        """Return the additive mask for each window that a layer has; window 0 is the whole context.

        A query sees no later token, no padding, and nothing beyond its window but the prefix: where that fell out of
        sight, the attention sinks would come back (StreamingLLM: Xiao et al., 2024). Windows and ALiBi count tokens,
        those of the prefix included and padding excluded, so that padding does not change the result.

        Args:
            ids: token ids ``[B, S]``.
            mask: 1 on tokens, 0 on padding ``[B, L]``; its values for slots after the new tokens have no effect.
            write_indices: slot of the first new token ``[B]`` in a static cache; None where the new tokens come last.

        Returns:
            Window to ``[B, 1 or H, G * S, L]``, or ``[B, 1 or H, S, L]`` if not ``grouped``.
        """
        g = self.g
        length = g.op("Shape", mask, start=1, end=2)  # [1], L
        sequence = g.op("Shape", ids, start=1, end=2)  # [1], S
        total = g.op("Squeeze", length)
        keys = g.op("Range", g.int_scalar(0), total, g.int_scalar(1))  # [L]
        if write_indices is None:
            first = g.op("Sub", total, g.op("Squeeze", sequence))
            slots = g.op("Range", first, total, g.int_scalar(1))  # [S]
            queries = g.op("Unsqueeze", slots, g.ints(1))  # [S, 1]
        else:
            steps = g.op("Range", g.int_scalar(0), g.op("Squeeze", sequence), g.int_scalar(1))
            slots = g.op("Add", g.op("Unsqueeze", write_indices, g.ints(1)), steps)  # [B, S]
            queries = g.op("Unsqueeze", slots, g.ints(1, 3))  # [B, 1, S, 1]
        causal = g.op("LessOrEqual", keys, queries)  # [S, L] or [B, 1, S, L]
        kept = g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.BOOL)), g.ints(1, 2))  # [B, 1, 1, L]
        windows = sorted({self.spec.window(i) for i in range(self.spec.num_layers)})
        alibi, counted = g.scalar(0.0), self.family.positions == "alibi"
        if counted or any(windows):
            numbers = g.op("CumSum", mask, g.int_scalar(1))  # [B, L]
            if write_indices is None:
                # Not a Slice: behind one, TensorRT-RTX 1.7.1 fuses 1 attention of SmolLM2 with windows instead of 30.
                query_numbers = g.op("Gather", numbers, slots, axis=1)
            else:
                query_numbers = g.op("GatherElements", numbers, slots, axis=1)
            distance = self._distance(numbers, query_numbers)
        if counted:
            alibi = self._alibi(distance)
        group = self.spec.num_heads // self.spec.num_kv_heads if self.grouped else 1
        found: dict[int, ir.Value] = {}
        for window in windows:
            allowed = g.op("And", causal, kept)  # [B, 1, S, L]
            if window:
                near = g.op("Less", distance, g.int_scalar(window))
                if self.kept:
                    near = g.op("Or", near, g.op("Less", keys, g.int_scalar(self.kept)))
                allowed = g.op("And", allowed, near)
            bias = g.op("Where", allowed, alibi, g.scalar(MASKED[g.dtype]))
            found[window] = bias if group == 1 else g.op("Concat", *[bias] * group, axis=2)
        return found

    def _distance(self, numbers: ir.Value, query_numbers: ir.Value) -> ir.Value:
        """Return by how many tokens each key precedes each query, int64 ``[B, 1, S, L]``.

        Args:
            numbers: of each token among those of its row ``[B, L]``.
            query_numbers: the same of the new tokens ``[B, S]``.
        """
        g = self.g
        of_queries = g.op("Unsqueeze", query_numbers, g.ints(1, 3))  # [B, 1, S, 1]
        return g.op("Sub", of_queries, g.op("Unsqueeze", numbers, g.ints(1, 2)))

    def _alibi(self, distance: ir.Value) -> ir.Value:
        """Return the ALiBi bias of the scores of each head, ``[B, H, S, L]``.

        It is computed from the distance to the query. Softmax sees differences alone, so any origin would do, but
        float16 is most precise near zero, and that is where the keys with the largest weights then are.
        """
        g = self.g
        slopes = -alibi_slopes(self.spec.num_heads)[None, :, None, None]
        wide = g.op("Cast", distance, to=int(ir.DataType.FLOAT))
        return g.from_float32(g.op("Mul", wide, g.constant(slopes, "alibi_slopes")))


def alibi_slopes(heads: int) -> FloatArray:
    """Return the slope of each head, float32 ``[heads]``: powers of 2^(-8 / n) (Press et al., 2022).

    n is the largest power of two up to ``heads``; the remaining heads take every other slope of 2 n heads.
    """
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-8 * (2 * i + 1) / (2 * whole)) for i in range(heads - whole)]
    return np.array(slopes, dtype=np.float32)
