"""The prefix inside the graph: constant keys and values before the cache, invisible to the caller.

Shapes in comments: B batch, T past + S, P prefix, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.kv_scales import KvPart
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.export.builder import GraphBuilder


@dataclass(frozen=True)
class BakedPrefix:
    """A prefix stored in the graph; the graph's inputs and outputs do not count it.

    Attributes:
        g: the graph.
        prefix: keys and values; an empty one adds no node.
    """

    g: GraphBuilder
    prefix: Prefix

    @property
    def length(self) -> int:
        """P."""
        return self.prefix.length

    def shift(self, positions: ir.Value) -> ir.Value:
        """Return the caller's positions ``[B, S]`` counted from the first token of the prefix."""
        return self.g.op("Add", positions, self.g.int_scalar(self.length)) if self.length else positions

    def extend_mask(self, mask: ir.Value) -> ir.Value:
        """Return the padding mask ``[B, T]`` with P ones before it: ``[B, P + T]``."""
        if not self.length:
            return mask
        g = self.g
        batch = g.op("Shape", mask, start=0, end=1)
        ones = g.op("Expand", g.int_scalar(1), g.op("Concat", batch, g.ints(self.length), axis=0))
        return g.op("Concat", ones, mask, axis=1)

    def batch_shape(self, mask: ir.Value) -> ir.Value | None:
        """Return ``[B, K, P, D]`` as an int64 tensor, the shape that a layer's prefix is expanded to.

        None where it is not joined with the cache: without a prefix, and in float32, which multiplies the two apart.
        """
        if not self.length or self.g.dtype == ir.DataType.FLOAT:
            return None
        batch = self.g.op("Shape", mask, start=0, end=1)
        return self.g.op("Concat", batch, self.g.ints(*self.prefix.keys.shape[1:]), axis=0)

    def constant(self, layer: int, part: KvPart) -> ir.Value:
        """Return the keys or values of a layer as an initializer ``[1, K, P, D]``."""
        array = (self.prefix.keys if part == "key" else self.prefix.values)[layer]
        return self.g.constant(np.ascontiguousarray(array[None]).astype(self.g.dtype.numpy()), f"prefix.{layer}.{part}")
