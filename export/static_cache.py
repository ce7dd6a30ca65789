"""A cache of fixed capacity inside the graph: new keys and values are written into their slots, nothing is copied."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.export.builder import GraphBuilder


@dataclass(frozen=True)
class StaticCache:
    """The operators around a cache of C slots that is updated in place.

    TensorRT makes KVCacheUpdate of TensorScatter where the cache is an input of the graph and what comes out is an
    output of it, and binds both to one address.

    Attributes:
        g: the graph.
        spec: the model.
        write_indices: slot of the first new token, int64 ``[B]``.
    """

    g: GraphBuilder
    spec: ModelSpec
    write_indices: ir.Value

    @property
    def one_operator(self) -> bool:
        """Whether attention can be one operator: ONNX caps scores behind the mask, and would open what that closed."""
        return not self.spec.score_cap

    def update(self, past: ir.Value, new: ir.Value) -> ir.Value:
        """Return the cache ``[B, K, C, D]`` with ``[B, K, S, D]`` in its slots."""
        return self.g.op("TensorScatter", past, new, self.write_indices, axis=2, mode="linear")

    def attend(self, query: ir.Value, key: ir.Value, value: ir.Value, bias: ir.Value) -> ir.Value:
        """Append attention of queries that are already scaled, as one operator.

        Written as two products, TensorRT-RTX 1.7.1 copies the whole cache into another layout before it multiplies,
        keys and values alike; its kernel for this operator reads the cache where it lies.

        Args:
            query: ``[B, K, G * S, D]``.
            key, value: ``[B, K, C, D]``.
            bias: additive mask ``[B, 1 or H, S, C]``.

        Returns:
            ``[B, H, S, D]``.
        """
        rows = self.g.op("Reshape", query, self.g.ints(0, self.spec.num_heads, -1, self.spec.head_dim))
        return self.g.op("Attention", rows, key, value, bias, scale=1.0)
