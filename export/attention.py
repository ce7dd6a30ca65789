"""Scaled dot-product attention over prefix and cache, in floating point, in the form that the engines fuse.

Shapes in comments: B batch, S sequence, T past + S, P prefix, L = P + T, H query heads, K key/value heads,
G = H / K, D head size. In a static cache T is its capacity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.export.baked_prefix import BakedPrefix
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.kv_cache import SWAP_LAST_AXES, KvCache


def is_one_operator(spec: ModelSpec, cache: KvCache) -> bool:
    """Whether attention is written as one Attention operator.

    That is so for a static cache: where attention is two products, TensorRT-RTX 1.7.1 copies the whole cache, keys and
    values alike, into another layout first. Soft caps rule it out: ONNX applies them after the mask, and a masked
    score would come back as ``-cap``.
    """
    return cache.capacity > 0 and not spec.score_cap


@dataclass(frozen=True)
class Attention:
    """Appends the attention of each layer of one graph.

    Attributes:
        g: the graph.
        spec: the model.
        cache: where keys and values are stored.
        prefix: keys and values before the cache.
        biases: for each window of the model's layers the additive mask ``[B, 1 or H, G * S, L]``, or
            ``[B, 1 or H, S, L]`` where :func:`is_one_operator`.
        prefix_shape: of :meth:`BakedPrefix.batch_shape`.
    """

    g: GraphBuilder
    spec: ModelSpec
    cache: KvCache
    prefix: BakedPrefix
    biases: dict[int, ir.Value]
    prefix_shape: ir.Value | None

    def add(self, layer: int, query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value:
        """Append the attention of a layer, and the update of its cache.

        Args:
            layer: index of the layer.
            query: ``[B, H, S, D]``, rotated and not yet scaled.
            key, value: those of the new tokens, ``[B, K, S, D]``.

        Returns:
            ``[B, S, H * D]``.
        """
        g, heads, size = self.g, self.spec.num_heads, self.spec.head_dim
        query = g.op("Mul", query, g.scalar(self.spec.attention_scale))
        # Query heads that share a key head become rows of one matrix: keys and values need no repetition.
        query = g.op("Reshape", query, g.ints(0, self.spec.num_kv_heads, -1, size))  # [B, K, G * S, D]
        keys, values = self.cache.update(layer, "key", key), self.cache.update(layer, "value", value)
        if is_one_operator(self.spec, self.cache):
            context = self._one_operator(layer, query, keys, values)
        elif g.dtype != ir.DataType.FLOAT:
            context = self._joined(layer, query, keys, values)
        elif self.prefix.length:
            context = self._split(layer, query, keys, values)
        else:
            transposed, values = self.cache.read_transposed(layer, keys), self.cache.read(layer, "value", values)
            context = self._products(layer, query, transposed, values)
        rows = g.op("Transpose", g.op("Reshape", context, g.ints(0, heads, -1, size)), perm=[0, 2, 1, 3])
        return g.op("Reshape", rows, g.ints(0, 0, heads * size))

    def _one_operator(self, layer: int, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Return the context ``[B, H, S, D]`` by one Attention operator, which reads a static cache in place."""
        rows = self.g.op("Reshape", query, self.g.ints(0, self.spec.num_heads, -1, self.spec.head_dim))
        return self.g.op("Attention", rows, keys, values, self._bias(layer), scale=1.0)

    def _joined(self, layer: int, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Return the context ``[B, K, G * S, D]``, prefix and cache concatenated: the form that TensorRT fuses."""
        g = self.g
        keys, values = self.cache.read(layer, "key", keys), self.cache.read(layer, "value", values)
        if self.prefix_shape is not None:
            before = g.op("Expand", self.prefix.constant(layer, "key"), self.prefix_shape)
            keys = g.op("Concat", before, keys, axis=2)
            before = g.op("Expand", self.prefix.constant(layer, "value"), self.prefix_shape)
            values = g.op("Concat", before, values, axis=2)
        return self._products(layer, query, g.op("Transpose", keys, perm=SWAP_LAST_AXES), values)

    def _products(self, layer: int, query: ir.Value, transposed_keys: ir.Value, values: ir.Value) -> ir.Value:
        """Return the context ``[B, K, G * S, D]`` as two products with a softmax between them."""
        weights = self._softmax(layer, self.g.op("MatMul", query, transposed_keys, name="scores"))
        return self.g.op("MatMul", weights, values, name="context")

    def _split(self, layer: int, query: ir.Value, keys: ir.Value, values: ir.Value) -> ir.Value:
        """Return the context ``[B, K, G * S, D]``, prefix and cache multiplied separately and joined as scores.

        A decode step then copies no keys and values to put the prefix before them, which would cost a tenth of it on
        a CPU.
        """
        g = self.g
        transposed = g.op("Transpose", self.prefix.constant(layer, "key"), perm=SWAP_LAST_AXES)
        on_prefix = g.op("MatMul", query, transposed, name="prefix_scores")
        on_cache = g.op("MatMul", query, self.cache.read_transposed(layer, keys), name="scores")
        weights = self._softmax(layer, g.op("Concat", on_prefix, on_cache, axis=-1))
        start, end, last = g.ints(self.prefix.length), g.ints(np.iinfo(np.int64).max), g.ints(-1)
        on_prefix = g.op("Slice", weights, g.ints(0), start, last)
        on_cache = g.op("Slice", weights, start, end, last)
        return g.op(
            "Add",
            g.op("MatMul", on_prefix, self.prefix.constant(layer, "value"), name="prefix_context"),
            g.op("MatMul", on_cache, self.cache.read(layer, "value", values), name="context"),
        )

    def _softmax(self, layer: int, scores: ir.Value) -> ir.Value:
        """Return the attention weights of scores ``[B, K, G * S, L]``: soft cap, mask, softmax."""
        g = self.g
        if self.spec.score_cap:
            cap = g.scalar(self.spec.score_cap)
            scores = g.op("Mul", g.op("Tanh", g.op("Div", scores, cap)), cap)
        return g.op("Softmax", g.op("Add", scores, self._bias(layer)), axis=-1)

    def _bias(self, layer: int) -> ir.Value:
        return self.biases[self.spec.window(layer)]
