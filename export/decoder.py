"""The decoder as a graph, from embedding to logits: a flat forward pass over the family description.

``logits_start`` is an initializer that a caller may override: the head then sees the tokens from there on only.
A prompt needs the logits of its last token, and the head of a small model is a fifth of the work.

Shapes in comments: B batch, S sequence, T past + S, P prefix, L = P + T, H query heads, K key/value heads,
G = H / K, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import PackedLinear, add_linear
from cushion_deploy.export.prefix_kv import PrefixKv
from cushion_deploy.export.rotary import inverse_frequencies
from cushion_deploy.families import Family
from cushion_deploy.types import HEAD_SITE, FloatArray, ModelSpec, Site, WeightSource, layer_site

MASKED = {ir.DataType.FLOAT: -1e9, ir.DataType.FLOAT16: -3e4}
"""Additive mask: exp() of it is 0, and a score added to it stays finite in its type."""


@dataclass
class DecoderGraph:
    """Builds one decoder graph; a fresh one per export.

    Attributes:
        g: the builder that collects nodes.
        spec, family, weights: the model.
        prefix: keys and values to bake in; of length 0 for none.
        dtype: floating-point type of activations.
        scales: activation scale per Site to quantize; empty for the float twin. A Site without a scale stays
            in floating point.
    """

    g: GraphBuilder
    spec: ModelSpec
    family: Family
    weights: WeightSource
    prefix: PrefixKv
    dtype: ir.DataType
    scales: Mapping[Site, float]

    def build(self) -> ir.Model:
        """Return the finished model."""
        g, spec = self.g, self.spec
        ids = g.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        cache_shape: list[int | str] = ["batch", spec.num_kv_heads, "past", spec.head_dim]
        past = [
            tuple(g.input(f"past_key_values.{i}.{part}", self.dtype, cache_shape) for part in ("key", "value"))
            for i in range(spec.num_layers)
        ]
        g.scope("inputs")
        self.cos, self.sin = self._rotary(positions)
        self.bias = self._attention_bias(ids, self.prefix.extend_mask(g, mask))
        self.prefix_shape = self.prefix.batch_shape(g, mask)
        g.scope("embedding")
        x = g.op("Gather", self._embedding(), ids, axis=0)  # [B, S, hidden]
        for i, (past_key, past_value) in enumerate(past):
            x = self._attention(i, x, past_key, past_value)
            x = self._mlp(i, x)
        g.scope("head")
        if self.dtype == ir.DataType.FLOAT:
            # The float16 graph is for engines that take no optional inputs.
            start = g.optional_input("logits_start", np.zeros(1, dtype=np.int64))
            x = g.op("Slice", x, start, g.ints(np.iinfo(np.int64).max), g.ints(1))
        logits = self._head(self._norm(x, self.family.final_norm))
        g.output(logits, "logits", ir.DataType.FLOAT, ["batch", "sequence", spec.vocab_size])
        # Graph outputs in the order that runtimes expect: logits first, then present keys and values.
        g.outputs.insert(0, g.outputs.pop())
        return g.build(spec.family)

    def _rotary(self, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return cos and signed sin ``[B, 1, S, D]``; sin is negated on the first half, see :meth:`_rotate`."""
        g = self.g
        frequencies = inverse_frequencies(self.spec.rotary, self.spec.head_dim)
        shifted = g.op("Add", positions, g.int_scalar(self.prefix.length)) if self.prefix.length else positions
        column = g.op("Unsqueeze", g.op("Cast", shifted, to=int(ir.DataType.FLOAT)), g.ints(1, 3))
        angles = g.op("Mul", column, g.constant(frequencies, "rotary_frequencies"))  # [B, 1, S, D/2]
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
        pair = g.op("Concat", cos, cos, axis=-1), g.op("Concat", g.op("Neg", sin), sin, axis=-1)
        if self.dtype == ir.DataType.FLOAT:
            return pair
        return g.op("Cast", pair[0], to=int(self.dtype)), g.op("Cast", pair[1], to=int(self.dtype))

    def _attention_bias(self, ids: ir.Value, mask: ir.Value) -> ir.Value:
        """Return the additive mask ``[B, 1, G * S, L]``: causal, and closed on padding; one row block per group."""
        g = self.g
        length = g.op("Shape", mask, start=1, end=2)  # [1], L
        sequence = g.op("Shape", ids, start=1, end=2)  # [1], S
        total = g.op("Squeeze", length)
        keys = g.op("Range", g.int_scalar(0), total, g.int_scalar(1))  # [L]
        first = g.op("Sub", total, g.op("Squeeze", sequence))
        queries = g.op("Unsqueeze", g.op("Range", first, total, g.int_scalar(1)), g.ints(1))  # [S, 1]
        causal = g.op("LessOrEqual", keys, queries)  # [S, L]
        kept = g.op("Unsqueeze", g.op("Cast", mask, to=int(ir.DataType.BOOL)), g.ints(1, 2))  # [B, 1, 1, L]
        allowed = g.op("And", causal, kept)  # [B, 1, S, L]
        numpy_type = self.dtype.numpy()
        bias = g.op(
            "Where",
            allowed,
            g.constant(np.array(0, dtype=numpy_type)),
            g.constant(np.array(MASKED[self.dtype], dtype=numpy_type)),
        )
        group = self.spec.num_heads // self.spec.num_kv_heads
        return bias if group == 1 else g.op("Concat", *[bias] * group, axis=2)

    def _attention(self, i: int, x: ir.Value, past_key: ir.Value, past_value: ir.Value) -> ir.Value:
        g, spec = self.g, self.spec
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        g.scope(f"layers.{i}.attn")
        normed = self._norm(x, f"{self.family.layer(i)}.{self.family.attention_norm}")
        packed = self._linear(layer_site(i, "attn.qkv"), normed)  # [B, S, (H + 2K) * D]
        split = g.op("Transpose", g.op("Reshape", packed, g.ints(0, 0, heads + 2 * kv, size)), perm=[0, 2, 1, 3])
        query_key, value = g.ops("Split", 2, split, g.ints(heads + kv, kv), axis=1)
        query, key = g.ops("Split", 2, self._rotate(query_key), g.ints(heads, kv), axis=1)
        scale = g.constant(np.array(1 / math.sqrt(size), dtype=self.dtype.numpy()))
        # Group the query heads of one key head as rows: keys and values need no repetition.
        query = g.op("Reshape", g.op("Mul", query, scale), g.ints(0, kv, -1, size))  # [B, K, G * S, D]
        present_key = g.op("Concat", past_key, key, axis=2)  # [B, K, T, D]
        present_value = g.op("Concat", past_value, value, axis=2)
        context = self.prefix.attend(
            g, i, query, present_key, present_value, self.bias, self.prefix_shape
        )  # [B, K, G * S, D]
        rows = g.op("Transpose", g.op("Reshape", context, g.ints(0, heads, -1, size)), perm=[0, 2, 1, 3])
        joined = g.op("Reshape", rows, g.ints(0, 0, heads * size))
        for part, value_ in (("key", present_key), ("value", present_value)):
            g.output(value_, f"present.{i}.{part}", self.dtype, ["batch", kv, "total", size])
        return g.op("Add", x, self._linear(layer_site(i, "attn.out"), joined), name="residual")

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        g = self.g
        g.scope(f"layers.{i}.mlp")
        normed = self._norm(x, f"{self.family.layer(i)}.{self.family.mlp_norm}")
        packed = self._linear(layer_site(i, "mlp.gate_up"), normed)
        gate, up = g.ops("Split", 2, packed, g.ints(*[self.spec.intermediate_size] * 2), axis=-1)
        hidden = g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)
        return g.op("Add", x, self._linear(layer_site(i, "mlp.down"), hidden), name="residual")

    def _rotate(self, x: ir.Value) -> ir.Value:
        """Rotate pairs ``(j, j + D/2)``: x * cos + swapped halves of x * signed sin."""
        g, half = self.g, self.spec.head_dim // 2
        first, second = g.ops("Split", 2, x, g.ints(half, half), axis=-1)
        swapped = g.op("Concat", second, first, axis=-1)
        return g.op("Add", g.op("Mul", x, self.cos), g.op("Mul", swapped, self.sin))

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        """Root mean square norm; in float32 always, as transformers computes it."""
        g = self.g
        wide = x if self.dtype == ir.DataType.FLOAT else g.op("Cast", x, to=int(ir.DataType.FLOAT))
        mean = g.reduce_mean_last(g.op("Pow", wide, g.constant(np.array(2, dtype=np.float32))))
        root = g.op("Sqrt", g.op("Add", mean, g.constant(np.array(self.spec.norm_eps, dtype=np.float32))))
        normed = g.op("Div", wide, root)
        if self.dtype != ir.DataType.FLOAT:
            normed = g.op("Cast", normed, to=int(self.dtype))
        return g.op("Mul", normed, self._tensor(f"{path}.weight"))

    def _linear(self, site: Site, x: ir.Value) -> ir.Value:
        linears = self.family.linears(self.spec, head=True)[site]
        return add_linear(self.g, x, PackedLinear(site, linears, self.weights), self.dtype, self.scales.get(site))

    def _head(self, x: ir.Value) -> ir.Value:
        """Return logits float32; a float head that is tied reads the embedding itself (stored once)."""
        g, spec = self.g, self.spec
        tied = spec.tied_head or f"{self.family.head}.weight" not in self.weights.names()
        path = self.family.embedding if tied else self.family.head
        if HEAD_SITE in self.scales:
            linear = PackedLinear(HEAD_SITE, (path,), self.weights)
            logits = add_linear(g, x, linear, self.dtype, self.scales[HEAD_SITE])
        elif tied:
            rows = g.op("Reshape", x, g.ints(-1, spec.hidden_size))
            scores = g.op("Gemm", rows, self._embedding(), transB=1)
            shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.ints(spec.vocab_size), axis=0)
            # allowzero: logits_start may leave no row at all; engines of the float16 graph never see that.
            logits = g.op("Reshape", scores, shape, allowzero=int(self.dtype == ir.DataType.FLOAT))
        else:
            logits = add_linear(g, x, PackedLinear(HEAD_SITE, (path,), self.weights), self.dtype, None)
        # A node of its own, so that the output carries the name and type of the contract.
        return g.op("Cast", logits, to=int(ir.DataType.FLOAT)) if self.dtype != ir.DataType.FLOAT else logits

    def _embedding(self) -> ir.Value:
        size = (self.spec.vocab_size, self.spec.hidden_size)
        name = f"{self.family.embedding}.weight"
        return self.g.lazy(name, self.dtype, size, lambda: self.weights.get(name).astype(self.dtype.numpy()))

    def _tensor(self, name: str) -> ir.Value:
        array: FloatArray = self.weights.get(name)
        return self.g.lazy(name, self.dtype, array.shape, lambda: self.weights.get(name).astype(self.dtype.numpy()))
