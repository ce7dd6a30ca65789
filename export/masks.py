"""What is added to the scores of attention: causality, padding, sliding windows, ALiBi.

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
"""Additive mask: exp() of it is 0, and a score added to it stays finite in its type."""


@dataclass(frozen=True)
class AttentionMasks:
    """Builds the additive masks of one graph: one for each window that its layers have.

    ``grouped`` repeats their rows for the G query heads that share a key head.
    """

    g: GraphBuilder
    spec: ModelSpec
    family: Family
    dtype: ir.DataType
    grouped: bool = True

    def add(self, ids: ir.Value, mask: ir.Value, write_indices: ir.Value | None = None) -> dict[int, ir.Value]:
        """Return the additive mask ``[B, 1 or H, G * S, L]`` for each window that a layer has; 0 looks at everything.

        Causal, and closed on padding; one row block per group where ``grouped``, else ``[B, 1 or H, S, L]``. Windows
        and ALiBi count tokens, those of the prefix too and padding not, so that padding changes nothing.

        Args:
            ids: token ids ``[B, S]``.
            mask: 1 on tokens, 0 on padding ``[B, L]``; what it says of slots behind the new tokens has no effect.
            write_indices: slot of the first new token ``[B]`` in a static cache; None where the new tokens end it.
        """
        g = self.g
        length = g.op("Shape", mask, start=1, end=2)  # [1], L
        sequence = g.op("Shape", ids, start=1, end=2)  # [1], S
        total = g.op("Squeeze", length)
        keys = g.op("Range", g.int_scalar(0), total, g.int_scalar(1))  # [L]
        if write_indices is None:
            first = g.op("Sub", total, g.op("Squeeze", sequence))
            queries = g.op("Unsqueeze", g.op("Range", first, total, g.int_scalar(1)), g.ints(1))  # [S, 1]
        else:
            steps = g.op("Range", g.int_scalar(0), g.op("Squeeze", sequence), g.int_scalar(1))
            slots = g.op("Add", g.op("Unsqueeze", write_indices, g.ints(1)), steps)  # [B, S]
            queries = g.op("Unsqueeze", slots, g.ints(1, 3))  # [B, 1, S, 1]
        causal = g.op("LessOrEqual", keys, queries)  # [S, L] or [B, 1, S, L]
        kept = g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.BOOL)), g.ints(1, 2))  # [B, 1, 1, L]
        windows = sorted({self.spec.window(i) for i in range(self.spec.num_layers)})
        alibi, counted = self._scalar(0.0), self.family.positions == "alibi"
        if counted or any(windows):
            places = g.op("CumSum", mask, g.int_scalar(1))  # [B, L]
            here = self._last(places, first) if write_indices is None else g.op("GatherElements", places, slots, axis=1)
            distance = self._distance(places, here)
        if counted:
            alibi = self._alibi(distance)
        group = self.spec.num_heads // self.spec.num_kv_heads if self.grouped else 1
        found: dict[int, ir.Value] = {}
        for window in windows:
            allowed = g.op("And", causal, kept)  # [B, 1, S, L]
            if window:
                allowed = g.op("And", allowed, g.op("Less", distance, g.int_scalar(window)))
            bias = g.op("Where", allowed, alibi, self._scalar(MASKED[self.dtype]))
            found[window] = bias if group == 1 else g.op("Concat", *[bias] * group, axis=2)
        return found

    def _last(self, places: ir.Value, first: ir.Value) -> ir.Value:
        """Return the columns ``[B, S]`` of ``[B, L]`` from ``first`` on."""
        g = self.g
        begin, end = g.op("Unsqueeze", first, g.ints(0)), g.ints(np.iinfo(np.int64).max)
        return g.op("Slice", places, begin, end, g.ints(1))

    def _distance(self, places: ir.Value, here: ir.Value) -> ir.Value:
        """Return how many tokens each key is before each query, int64 ``[B, 1, S, L]``.

        Args:
            places: number of each token among those of its row ``[B, L]``.
            here: the same of the queries ``[B, S]``.
        """
        g = self.g
        of_queries = g.op("Unsqueeze", here, g.ints(1, 3))  # [B, 1, S, 1]
        return g.op("Sub", of_queries, g.op("Unsqueeze", places, g.ints(1, 2)))

    def _alibi(self, distance: ir.Value) -> ir.Value:
        """Return what ALiBi adds to the scores of each head, ``[B, H, S, L]``.

        By the distance from each query: softmax sees differences alone, so any origin would do, but only near zero
        do the keys that matter keep their precision in half.
        """
        g = self.g
        slopes = -alibi_slopes(self.spec.num_heads)[None, :, None, None]
        far = g.op("Cast", distance, to=int(ir.DataType.FLOAT))
        added = g.op("Mul", far, g.constant(slopes, "alibi_slopes"))
        return added if self.dtype == ir.DataType.FLOAT else g.op("Cast", added, to=int(self.dtype))

    def _scalar(self, value: float) -> ir.Value:
        """Return a constant of the graph's type."""
        return self.g.constant(np.array(value, dtype=self.dtype.numpy()))


def alibi_slopes(heads: int) -> FloatArray:
    """Return the slope of each head, float32 ``[heads]``: powers of 2^(-8 / n) (Press et al., 2022).

    n is the largest power of two within ``heads``; the heads beyond it take every other slope of 2 n heads.
    """
    whole = 2 ** int(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2.0 ** (-8 * (2 * i + 1) / (2 * whole)) for i in range(heads - whole)]
    return np.array(slopes, dtype=np.float32)
