"""The prefix inside the graph: constant keys and values before the past, invisible from outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.types import Prefix


@dataclass(frozen=True)
class PrefixKv:
    """A prefix baked into attention; inputs and outputs of the graph never show it."""

    prefix: Prefix
    dtype: ir.DataType

    @property
    def length(self) -> int:
        """P."""
        return self.prefix.length

    def extend_mask(self, g: GraphBuilder, mask: ir.Value) -> ir.Value:
        """Return the padding mask ``[B, T]`` with P ones before it: ``[B, P + T]``."""
        if not self.length:
            return mask
        batch = g.op("Shape", mask, start=0, end=1)
        ones = g.op("Expand", g.int_scalar(1), g.op("Concat", batch, g.ints(self.length), axis=0))
        return g.op("Concat", ones, mask, axis=1)

    def batch_shape(self, g: GraphBuilder, mask: ir.Value) -> ir.Value:
        """Return the shape ``[B, K, P, D]`` that every layer's prefix is expanded to, int64 ``[4]``."""
        batch = g.op("Shape", mask, start=0, end=1)
        return g.op("Concat", batch, g.ints(*self.prefix.keys.shape[1:]), axis=0)

    def attend(
        self,
        g: GraphBuilder,
        layer: int,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value,
        shape: ir.Value | None,
    ) -> ir.Value:
        """Append scaled dot-product attention over prefix and context, in floating point.

        Args:
            g: the graph.
            layer: index of the layer.
            query: ``[B, K, G * S, D]``, already scaled.
            key, value: ``[B, K, T, D]``, the present without the prefix.
            bias: additive mask ``[B, 1, G * S, P + T]``.
            shape: of :meth:`batch_shape`; None where there is no prefix.

        Returns:
            ``[B, K, G * S, D]``.
        """
        if shape is not None:
            key = g.op("Concat", g.op("Expand", self._constant(g, layer, "key"), shape), key, axis=2)
            value = g.op("Concat", g.op("Expand", self._constant(g, layer, "value"), shape), value, axis=2)
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]), name="scores")
        weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
        return g.op("MatMul", weights, value, name="context")

    def _constant(self, g: GraphBuilder, layer: int, part: str) -> ir.Value:
        """Return the prefix of a layer as an initializer ``[1, K, P, D]``."""
        array = (self.prefix.keys if part == "key" else self.prefix.values)[layer]
        return g.constant(np.ascontiguousarray(array[None]).astype(self.dtype.numpy()), f"prefix.{layer}.{part}")
