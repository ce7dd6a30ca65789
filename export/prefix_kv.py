"""The prefix inside the graph: constant keys and values before the past, invisible from outside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.kv_cache import TURNED, KvCache


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

    def batch_shape(self, g: GraphBuilder, mask: ir.Value) -> ir.Value | None:
        """Return the shape ``[B, K, P, D]``, int64 ``[4]``, that every layer's prefix is expanded to; None if none."""
        if not self.length or self.dtype == ir.DataType.FLOAT:
            return None
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
        cap: float,
        cache: KvCache,
    ) -> ir.Value:
        """Append scaled dot-product attention over prefix and context, in floating point.

        Args:
            g: the graph.
            layer: index of the layer.
            query: ``[B, K, G * S, D]``, already scaled.
            key, value: ``[B, K, T, D]``, the present without the prefix, as the cache keeps it.
            bias: additive mask ``[B, 1 or H, G * S, P + T]``.
            shape: of :meth:`batch_shape`.
            cap: soft cap of the scores; 0 for none.
            cache: reads the present.

        Returns:
            ``[B, K, G * S, D]``.
        """
        if self.length and self.dtype == ir.DataType.FLOAT:
            return self._attend_apart(g, layer, query, key, value, bias, cap, cache)
        if self.dtype == ir.DataType.FLOAT:
            turned = cache.read_turned(g, layer, key)
        else:
            key = cache.read(g, layer, "key", key)
        value = cache.read(g, layer, "value", value)
        if shape is not None:
            key = g.op("Concat", g.op("Expand", self._constant(g, layer, "key"), shape), key, axis=2)
            value = g.op("Concat", g.op("Expand", self._constant(g, layer, "value"), shape), value, axis=2)
        if self.dtype != ir.DataType.FLOAT:
            turned = g.op("Transpose", key, perm=TURNED)
        scores = g.op("MatMul", query, turned, name="scores")
        weights = g.op("Softmax", g.op("Add", self._capped(g, scores, cap), bias), axis=-1)
        return g.op("MatMul", weights, value, name="context")

    def _attend_apart(
        self,
        g: GraphBuilder,
        layer: int,
        query: ir.Value,
        key: ir.Value,
        value: ir.Value,
        bias: ir.Value,
        cap: float,
        cache: KvCache,
    ) -> ir.Value:
        """Append the same attention, prefix and context multiplied apart and joined as scores.

        A decode step then copies no keys and values for the sake of the prefix; joined, they cost a tenth of it on
        a CPU. The float16 graph joins them all the same: TensorRT fuses only the plain form.
        """
        turned = g.op("Transpose", self._constant(g, layer, "key"), perm=TURNED)
        parts = [
            g.op("MatMul", query, turned, name="prefix_scores"),
            g.op("MatMul", query, cache.read_turned(g, layer, key), name="scores"),
        ]
        scores = self._capped(g, g.op("Concat", *parts, axis=-1), cap)
        weights = g.op("Softmax", g.op("Add", scores, bias), axis=-1)
        start, end, last = g.ints(self.length), g.ints(np.iinfo(np.int64).max), g.ints(-1)
        on_prefix = g.op("Slice", weights, g.ints(0), start, last)
        on_text = g.op("Slice", weights, start, end, last)
        return g.op(
            "Add",
            g.op("MatMul", on_prefix, self._constant(g, layer, "value"), name="prefix_context"),
            g.op("MatMul", on_text, cache.read(g, layer, "value", value), name="context"),
        )

    def _capped(self, g: GraphBuilder, scores: ir.Value, cap: float) -> ir.Value:
        if not cap:
            return scores
        limit = g.constant(np.array(cap, dtype=self.dtype.numpy()))
        return g.op("Mul", g.op("Tanh", g.op("Div", scores, limit)), limit)

    def _constant(self, g: GraphBuilder, layer: int, part: str) -> ir.Value:
        """Return the prefix of a layer as an initializer ``[1, K, P, D]``."""
        array = (self.prefix.keys if part == "key" else self.prefix.values)[layer]
        return g.constant(np.ascontiguousarray(array[None]).astype(self.dtype.numpy()), f"prefix.{layer}.{part}")
