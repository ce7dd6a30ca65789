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
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.kv_scales import KV_PARTS, KvScales
from cushion_deploy.core.model_spec import ModelSpec, RotaryScaling
from cushion_deploy.core.sites import HEAD_SITE, Site, layer_site
from cushion_deploy.core.weights import WeightSource, blocks
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.kv_cache import KvCache
from cushion_deploy.export.linear import PackedLinear, add_linear
from cushion_deploy.export.masks import AttentionMasks
from cushion_deploy.export.prefix_kv import PrefixKv
from cushion_deploy.export.rotary import inverse_frequencies, rotary_gain, turning_channels
from cushion_deploy.export.static_cache import StaticCache
from cushion_deploy.families import Family


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
        scale_dtype: type of scales and of quantized products.
        capacity: slots of a static cache that is updated in place; 0 for a cache that grows.
        kv: scales of an INT8 cache, which grows; None for one in floating point.
    """

    g: GraphBuilder
    spec: ModelSpec
    family: Family
    weights: WeightSource
    prefix: PrefixKv
    dtype: ir.DataType
    scales: Mapping[Site, float]
    scale_dtype: ir.DataType = ir.DataType.FLOAT
    capacity: int = 0
    kv: KvScales | None = None

    def build(self) -> ir.Model:
        """Return the finished model."""
        g, spec = self.g, self.spec
        self.cache = KvCache(self.kv, self.dtype)
        ids = g.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", self.capacity or "total"])
        positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        write_indices = g.input("write_indices", ir.DataType.INT64, ["batch"]) if self.capacity else None
        self.static = StaticCache(g, spec, write_indices) if write_indices else None
        cache_shape: list[int | str] = ["batch", spec.num_kv_heads, self.capacity or "past", spec.head_dim]
        past = [
            tuple(g.input(f"past_key_values.{i}.{part}", self.cache.element, cache_shape) for part in KV_PARTS)
            for i in range(spec.num_layers)
        ]
        g.scope("inputs")
        if self.prefix.length:
            positions = g.op("Add", positions, g.int_scalar(self.prefix.length))
        self.rotations = {
            name: self._rotation(positions, rotary, name)
            for name, rotary in (("rotary", spec.rotary), ("local_rotary", spec.local_rotary))
            if rotary is not None
        }
        kept = self.prefix.extend_mask(g, mask)
        grouped = self.static is None or not self.static.one_operator
        self.biases = AttentionMasks(g, spec, self.family, self.dtype, grouped).add(ids, kept, write_indices)
        self.prefix_shape = self.prefix.batch_shape(g, mask)
        x = self._embed(ids, positions)  # [B, S, hidden]
        for i, (past_key, past_value) in enumerate(past):
            x = self._attention(i, x, past_key, past_value)
            x = self._mlp(i, x)
        g.scope("head")
        if self._skips_head:
            start = g.optional_input("logits_start", np.zeros(1, dtype=np.int64))
            x = g.op("Slice", x, start, g.ints(np.iinfo(np.int64).max), g.ints(1))
        if f"{self.family.final_norm}.weight" in self.weights.names():
            x = self._norm(x, self.family.final_norm)
        logits = self._head(self._project(self.family.embedding_out, x))
        g.output(logits, "logits", ir.DataType.FLOAT, ["batch", "sequence", spec.vocab_size])
        # Graph outputs in the order that runtimes expect: logits first, then present keys and values.
        g.outputs.insert(0, g.outputs.pop())
        return g.build(spec.family)

    @property
    def _skips_head(self) -> bool:
        """Whether there is ``logits_start``: float16 and static graphs are for engines that take no optional inputs."""
        return self.dtype == ir.DataType.FLOAT and not self.capacity

    def _embed(self, ids: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the first hidden states ``[B, S, hidden]``; ``positions`` count the prefix."""
        g, family = self.g, self.family
        g.scope("embedding")
        x = g.op("Gather", self._embedding(), ids, axis=0)
        if family.scaled_embedding:
            x = g.op("Mul", x, self._scalar(math.sqrt(self.spec.hidden_size)))
        x = self._project(family.embedding_in, x)
        if family.position_embedding:
            rows = positions
            if family.position_offset:
                rows = g.op("Add", positions, g.int_scalar(family.position_offset))
            table = self._tensor(f"{family.position_embedding}.weight")
            x = g.op("Add", x, g.op("Gather", table, rows, axis=0))
        return self._norm(x, family.embedding_norm) if family.embedding_norm else x

    def _rotation(self, positions: ir.Value, rotary: RotaryScaling, name: str) -> tuple[ir.Value, ir.Value]:
        """Return cos and signed sin ``[B, 1, S, R]`` of the R channels that turn.

        sin is negated on the first half, see :meth:`_rotate`.
        """
        g, size = self.g, self.spec.head_dim
        frequencies = g.constant(inverse_frequencies(rotary, size), f"{name}_frequencies")
        column = g.op("Unsqueeze", g.op("Cast", positions, to=int(ir.DataType.FLOAT)), g.ints(1, 3))
        angles = g.op("Mul", column, frequencies)  # [B, 1, S, R / 2]
        cos, sin = g.op("Cos", angles), g.op("Sin", angles)
        gain = rotary_gain(rotary)
        if gain != 1:
            factor = g.constant(np.array(gain, dtype=np.float32))
            cos, sin = g.op("Mul", cos, factor), g.op("Mul", sin, factor)
        pair = g.op("Concat", cos, cos, axis=-1), g.op("Concat", g.op("Neg", sin), sin, axis=-1)
        return self._narrow(pair[0]), self._narrow(pair[1])

    def _attention(self, i: int, x: ir.Value, past_key: ir.Value, past_value: ir.Value) -> ir.Value:
        g, spec, family = self.g, self.spec, self.family
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        g.scope(f"layers.{i}.attn")
        layer = family.layer(i)
        normed = self._norm(x, f"{layer}.{family.attention_norm}") if spec.norm_first else x
        query_key, value = self._query_key_value(i, self._linear(layer_site(i, "attn.qkv"), normed))
        if family.positions == "rotary":
            query_key = self._rotate(query_key, i)
        query, key = g.ops("Split", 2, query_key, g.ints(heads, kv), axis=1)
        # Group the query heads of one key head as rows: keys and values need no repetition.
        query = g.op("Mul", query, self._scalar(spec.attention_scale))
        query = g.op("Reshape", query, g.ints(0, kv, -1, size))  # [B, K, G * S, D]
        bias = self.biases[spec.window(i)]
        if self.static:
            present_key, present_value = self.static.update(past_key, key), self.static.update(past_value, value)
        else:
            present_key = self.cache.present(g, i, "key", past_key, key)  # [B, K, T, D]
            present_value = self.cache.present(g, i, "value", past_value, value)
        if self.static and self.static.one_operator:
            context = self.static.attend(query, present_key, present_value, bias)
        else:
            given = query, present_key, present_value, bias, self.prefix_shape, spec.score_cap
            context = self.prefix.attend(g, i, *given, self.cache)  # [B, K, G * S, D]
        rows = g.op("Transpose", g.op("Reshape", context, g.ints(0, heads, -1, size)), perm=[0, 2, 1, 3])
        joined = g.op("Reshape", rows, g.ints(0, 0, heads * size))
        for part, value_ in (("key", present_key), ("value", present_value)):
            g.output(value_, f"present.{i}.{part}", self.cache.element, ["batch", kv, self.capacity or "total", size])
        out = self._linear(layer_site(i, "attn.out"), joined)
        return self._add_block(x, out, f"{layer}.{family.attention_norm}", family.attention_post_norm, layer)

    def _query_key_value(self, i: int, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return queries and keys ``[B, H + K, S, D]``, normed where the family does, and values ``[B, K, S, D]``."""
        g, spec, family = self.g, self.spec, self.family
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if family.qkv == "interleaved":
            parts = g.op("Reshape", packed, g.ints(0, 0, heads, 3, size))
            ordered = g.op("Transpose", parts, perm=[0, 3, 2, 1, 4])  # [B, 3, H, S, D]
            split = g.op("Reshape", ordered, g.ints(0, 3 * heads, -1, size))
        else:
            split = g.op("Transpose", g.op("Reshape", packed, g.ints(0, 0, heads + 2 * kv, size)), perm=[0, 2, 1, 3])
        if not family.query_norm:
            query_key, value = g.ops("Split", 2, split, g.ints(heads + kv, kv), axis=1)
            return query_key, value
        query, key, value = g.ops("Split", 3, split, g.ints(heads, kv, kv), axis=1)
        normed = [
            self._norm(part, f"{family.layer(i)}.{path}")
            for part, path in ((query, family.query_norm), (key, family.key_norm))
        ]
        return g.op("Concat", *normed, axis=1), value

    def _mlp(self, i: int, x: ir.Value) -> ir.Value:
        g, family = self.g, self.family
        g.scope(f"layers.{i}.mlp")
        layer = family.layer(i)
        normed = self._norm(x, f"{layer}.{family.mlp_norm}") if self.spec.norm_first else x
        if family.gated:
            packed = self._linear(layer_site(i, "mlp.gate_up"), normed)
            gate, up = g.ops("Split", 2, packed, g.ints(*[self.spec.intermediate_size] * 2), axis=-1)
            hidden = g.op("Mul", self._activate(gate), up)
        else:
            hidden = self._activate(self._linear(layer_site(i, "mlp.up"), normed))
        out = self._linear(layer_site(i, "mlp.down"), hidden)
        return self._add_block(x, out, f"{layer}.{family.mlp_norm}", family.mlp_post_norm, layer)

    def _add_block(self, x: ir.Value, out: ir.Value, norm: str, post_norm: str | None, layer: str) -> ir.Value:
        """Return the residual stream with a block's output added, and the norms that stand there."""
        if post_norm:
            out = self._norm(out, f"{layer}.{post_norm}")
        total = self.g.op("Add", x, out, name="residual")
        return total if self.spec.norm_first else self._norm(total, norm)

    def _activate(self, x: ir.Value) -> ir.Value:
        g = self.g
        if self.spec.activation == "relu":
            return g.op("Relu", x)
        if self.spec.activation == "silu":
            return g.op("Mul", x, g.op("Sigmoid", x))
        if self.spec.activation == "gelu":
            bent = g.op("Erf", g.op("Mul", x, self._scalar(math.sqrt(0.5))))
        else:
            cube = g.op("Mul", g.op("Mul", x, x), g.op("Mul", x, self._scalar(0.044715)))
            bent = g.op("Tanh", g.op("Mul", g.op("Add", x, cube), self._scalar(math.sqrt(2 / math.pi))))
        return g.op("Mul", g.op("Mul", x, self._scalar(0.5)), g.op("Add", bent, self._scalar(1.0)))

    def _rotate(self, x: ir.Value, layer: int) -> ir.Value:
        """Rotate pairs ``(j, j + R/2)`` of the first R channels: x * cos + swapped halves of x * signed sin."""
        g, size = self.g, self.spec.head_dim
        local = self.spec.local_rotary is not None and self.spec.window(layer) > 0
        cos, sin = self.rotations["local_rotary" if local else "rotary"]
        turning = turning_channels(self.spec.local_rotary if local else self.spec.rotary, size)
        rest: list[ir.Value] = []
        if turning < size:
            x, still = g.ops("Split", 2, x, g.ints(turning, size - turning), axis=-1)
            rest = [still]
        half = turning // 2
        first, second = g.ops("Split", 2, x, g.ints(half, half), axis=-1)
        swapped = g.op("Concat", second, first, axis=-1)
        turned = g.op("Add", g.op("Mul", x, cos), g.op("Mul", swapped, sin))
        return g.op("Concat", turned, *rest, axis=-1) if rest else turned

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        """Return the norm of the last axis; mean and root in float32 always, as transformers computes them."""
        g, eps = self.g, self.spec.norm_eps
        wide = x if self.dtype == ir.DataType.FLOAT else g.op("Cast", x, to=int(ir.DataType.FLOAT))
        if self.family.norm == "layer":
            parts = [self._tensor(f"{path}.{part}", ir.DataType.FLOAT) for part in ("weight", "bias")]
            return self._narrow(g.op("LayerNormalization", wide, *parts, axis=-1, epsilon=eps))
        mean = g.reduce_mean_last(g.op("Pow", wide, g.constant(np.array(2, dtype=np.float32))))
        root = g.op("Sqrt", g.op("Add", mean, g.constant(np.array(eps, dtype=np.float32))))
        normed, offset = g.op("Div", wide, root), self.family.norm_offset
        if offset:
            # 1 + w in half would lose a small w.
            return self._narrow(g.op("Mul", normed, self._tensor(f"{path}.weight", ir.DataType.FLOAT, offset)))
        return g.op("Mul", self._narrow(normed), self._tensor(f"{path}.weight"))

    def _project(self, path: str | None, x: ir.Value) -> ir.Value:
        """Return ``x`` through a linear that stays in floating point; a model that lacks it leaves ``x`` as it is."""
        if path is None or f"{path}.weight" not in self.weights.names():
            return x
        return add_linear(self.g, x, PackedLinear(Site(path), (path,), self.weights), self.dtype, None)

    def _linear(self, site: Site, x: ir.Value) -> ir.Value:
        linears = self.family.linears(self.spec, head=True)[site]
        packed = PackedLinear(site, linears, self.weights)
        return add_linear(self.g, x, packed, self.dtype, self.scales.get(site), self.scale_dtype)

    def _head(self, x: ir.Value) -> ir.Value:
        """Return logits float32; a float head that is tied reads the embedding itself (stored once)."""
        g, spec = self.g, self.spec
        tied = spec.tied_head or f"{self.family.head}.weight" not in self.weights.names()
        path = self.family.embedding if tied else self.family.head
        if HEAD_SITE in self.scales:
            linear = PackedLinear(HEAD_SITE, (path,), self.weights)
            logits = add_linear(g, x, linear, self.dtype, self.scales[HEAD_SITE], self.scale_dtype)
        elif tied:
            rows = g.op("Reshape", x, g.ints(-1, spec.embedding_size or spec.hidden_size))
            scores = g.op("Gemm", rows, self._embedding(), transB=1)
            shape = g.op("Concat", g.op("Shape", x, start=0, end=2), g.ints(spec.vocab_size), axis=0)
            # allowzero: logits_start may leave no row at all; engines of other graphs never see that.
            logits = g.op("Reshape", scores, shape, allowzero=int(self._skips_head))
        else:
            logits = add_linear(g, x, PackedLinear(HEAD_SITE, (path,), self.weights), self.dtype, None)
        if spec.logit_cap:
            cap = self._scalar(spec.logit_cap)
            logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, cap)), cap)
        # A node of its own, so that the output carries the name and type of the contract.
        return g.op("Cast", logits, to=int(ir.DataType.FLOAT)) if self.dtype != ir.DataType.FLOAT else logits

    def _embedding(self) -> ir.Value:
        return self._tensor(f"{self.family.embedding}.weight")

    def _tensor(self, name: str, dtype: ir.DataType | None = None, offset: float = 0.0) -> ir.Value:
        """Return a stored tensor, ``offset`` added, as an initializer of the graph's type or another."""
        element, shape = dtype or self.dtype, self.weights.shape(name)

        def load() -> npt.NDArray[Any]:
            array = np.empty(shape, element.numpy())
            for rows, block in blocks(self.weights, name):
                array[rows] = block + np.float32(offset)
            return array

        return self.g.lazy(name, element, shape, load)

    def _scalar(self, value: float) -> ir.Value:
        """Return a constant of the graph's type."""
        return self.g.constant(np.array(value, dtype=self.dtype.numpy()))

    def _narrow(self, x: ir.Value) -> ir.Value:
        """Return a float32 value in the graph's type."""
        return x if self.dtype == ir.DataType.FLOAT else self.g.op("Cast", x, to=int(self.dtype))
