"""The decoder as a graph, from token ids to logits: a flat forward pass that follows the family's description.

Shapes in comments: B batch, S sequence, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.sites import HEAD_SITE, Site, layer_site
from cushion_deploy.core.weights import WeightSource, blocks
from cushion_deploy.export.activations import add_activation
from cushion_deploy.export.attention import Attention, is_one_operator
from cushion_deploy.export.baked_prefix import BakedPrefix
from cushion_deploy.export.builder import DTYPES, GraphBuilder
from cushion_deploy.export.embedding import Embedding
from cushion_deploy.export.kv_cache import GrowingCache, Int8Cache, KvCache, StaticCache
from cushion_deploy.export.linear import PackedLinear, add_linear
from cushion_deploy.export.masks import AttentionMasks
from cushion_deploy.export.rotary import RotaryEmbedding
from cushion_deploy.export.rotation import add_rotation
from cushion_deploy.families import get_family


class DecoderGraph:
    """Builds one decoder graph; a fresh one per export."""

    def __init__(self, spec: ModelSpec, weights: WeightSource, quantization: Quantization, form: GraphForm) -> None:
        """Start an empty graph.

        Args:
            spec: the model.
            weights: its tensors, smoothing folded in.
            quantization: what the graph contains; a Site without a scale in it stays in floating point.
            form: checked against spec and quantization.

        Raises:
            UsageError: a Site that the scheme quantizes has no scale.
        """
        self.g = GraphBuilder(form.opset_of(quantization.scheme), DTYPES[form.dtype])
        self.spec, self.weights, self.form = spec, weights, form
        self.family = get_family(spec.family)
        self.sites = self.family.linears(spec, head=True)
        scales, scheme = quantization.scales, quantization.scheme
        self.scales = scales.of(scheme.of(self.sites)) if scales else {}
        rounded, codes = scheme.int8_embedding and form.quantized, form.holds_codes(scheme)
        self.embedding = Embedding(self.g, weights, f"{self.family.embedding}.weight", rounded, codes)
        self.kv_scales = quantization.kv_scales
        self.kept = quantization.prefix.kept
        self.rotations = quantization.smoothing.rotations if quantization.smoothing else {}
        self.prefix = BakedPrefix(self.g, Prefix.empty(spec) if form.prefix == "cache" else quantization.prefix)

    def build(self) -> ir.Model:
        """Return the finished model."""
        g, spec = self.g, self.spec
        ids = g.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = g.input("attention_mask", ir.DataType.INT64, ["batch", self.form.capacity or "total"])
        positions = g.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        cache = self._cache()
        g.scope("inputs")
        positions = self.prefix.shift(positions)
        self.rotary = {
            name: RotaryEmbedding(g, rotary, spec.head_dim, positions, name)
            for name, rotary in (("rotary", spec.rotary), ("local_rotary", spec.local_rotary))
            if rotary is not None
        }
        kept = self.prefix.extend_mask(mask)
        masks = AttentionMasks(g, spec, self.family, self.kept, grouped=not is_one_operator(spec, cache))
        biases = masks.add(ids, kept, cache.write_indices if isinstance(cache, StaticCache) else None)
        self.attention = Attention(g, spec, cache, self.prefix, biases, self.prefix.batch_shape(mask))
        x = self._embed(ids, positions)  # [B, S, hidden]
        for i in range(spec.num_layers):
            x = self._attention_block(i, x)
            x = self._mlp_block(i, x)
        g.output(self._logits(x), "logits", ir.DataType.FLOAT, ["batch", "sequence", spec.vocab_size])
        # Runtimes expect logits first, then present keys and values.
        g.outputs.insert(0, g.outputs.pop())
        return g.build(spec.family)

    def _cache(self) -> KvCache:
        if self.form.cache == "static":
            return StaticCache(self.g, self.spec, self.form.capacity)
        if self.kv_scales is not None:
            return Int8Cache(self.g, self.spec, self.kv_scales)
        return GrowingCache(self.g, self.spec)

    def _embed(self, ids: ir.Value, positions: ir.Value) -> ir.Value:
        """Return the first hidden states ``[B, S, hidden]``; ``positions`` count the prefix."""
        g, family = self.g, self.family
        g.scope("embedding")
        x = self.embedding.rows(ids)
        if family.scaled_embedding:
            x = g.op("Mul", x, g.scalar(math.sqrt(self.spec.hidden_size)))
        x = self._times(x, self.spec.embedding_factor)
        x = self._project(family.embedding_in, x)
        if family.position_embedding:
            rows = positions
            if family.position_offset:
                rows = g.op("Add", positions, g.int_scalar(family.position_offset))
            table = self._tensor(f"{family.position_embedding}.weight")
            x = g.op("Add", x, g.op("Gather", table, rows, axis=0))
        return self._norm(x, family.embedding_norm) if family.embedding_norm else x

    def _attention_block(self, i: int, x: ir.Value) -> ir.Value:
        g, spec, family = self.g, self.spec, self.family
        g.scope(f"layers.{i}.attn")
        norm = f"{family.layer(i)}.{family.attention_norm}" if family.attention_norm else None
        normed = self._norm(x, norm) if norm and spec.norm_first else x
        query_key, value = self._query_key_value(i, self._linear(layer_site(i, "attn.qkv"), normed))
        if family.positions == "rotary" and i not in spec.unrotated:
            local = spec.local_rotary is not None and spec.window(i) > 0
            query_key = self.rotary["local_rotary" if local else "rotary"].rotate(query_key)
        query, key = g.ops("Split", 2, query_key, g.ints(spec.num_heads, spec.num_kv_heads), axis=1)
        context = self.attention.add(i, query, key, value)  # [B, S, H * D]
        out = self._linear(layer_site(i, "attn.out"), context)
        return self._add_residual(i, x, out, norm, family.attention_post_norm)

    def _query_key_value(self, i: int, packed: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return queries and keys ``[B, H + K, S, D]``, normalized if the family does so, and values ``[B, K, S, D]``.

        Args:
            i: index of the layer.
            packed: output of its q/k/v linear, ``[B, S, (H + 2 K) * D]``.
        """
        g, spec, family = self.g, self.spec, self.family
        heads, kv, size = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if family.query_norm and family.norm_of_all_heads:
            sizes = g.ints(heads * size, kv * size, kv * size)
            whole = dict(zip(("query", "key", "value"), g.ops("Split", 3, packed, sizes, axis=-1), strict=True))
            for part, path in (("query", family.query_norm), ("key", family.key_norm)):
                whole[part] = self._norm(whole[part], f"{family.layer(i)}.{path}")
            packed = g.op("Concat", *whole.values(), axis=-1)
        if family.qkv == "interleaved":
            parts = g.op("Reshape", packed, g.ints(0, 0, heads, 3, size))
            ordered = g.op("Transpose", parts, perm=[0, 3, 2, 1, 4])  # [B, 3, H, S, D]
            split = g.op("Reshape", ordered, g.ints(0, 3 * heads, -1, size))
        else:
            split = g.op("Transpose", g.op("Reshape", packed, g.ints(0, 0, heads + 2 * kv, size)), perm=[0, 2, 1, 3])
        if not family.query_norm or family.norm_of_all_heads:
            query_key, value = g.ops("Split", 2, split, g.ints(heads + kv, kv), axis=1)
            return query_key, value
        query, key, value = g.ops("Split", 3, split, g.ints(heads, kv, kv), axis=1)
        normed = [
            self._norm(part, f"{family.layer(i)}.{path}")
            for part, path in ((query, family.query_norm), (key, family.key_norm))
        ]
        return g.op("Concat", *normed, axis=1), value

    def _mlp_block(self, i: int, x: ir.Value) -> ir.Value:
        g, spec, family = self.g, self.spec, self.family
        g.scope(f"layers.{i}.mlp")
        norm = f"{family.layer(i)}.{family.mlp_norm}" if family.mlp_norm else None
        normed = self._norm(x, norm) if norm and spec.norm_first else x
        if family.gated:
            packed = self._linear(layer_site(i, "mlp.gate_up"), normed)
            gate, up = g.ops("Split", 2, packed, g.ints(*[spec.intermediate_size] * 2), axis=-1)
            hidden = g.op("Mul", add_activation(g, gate, spec.activation), up)
        else:
            hidden = add_activation(g, self._linear(layer_site(i, "mlp.up"), normed), spec.activation)
        out = self._linear(layer_site(i, "mlp.down"), hidden)
        return self._add_residual(i, x, out, norm, family.mlp_post_norm)

    def _add_residual(self, i: int, x: ir.Value, out: ir.Value, norm: str | None, post_norm: str | None) -> ir.Value:
        """Return the residual stream with the output of a block added.

        Args:
            i: index of the layer.
            x: the residual stream ``[B, S, hidden]``.
            out: output of the block, same shape.
            norm: path of the block's norm, if it has one, applied to the sum where norms do not come first.
            post_norm: name of the norm of the output, if the family has one.
        """
        if post_norm:
            out = self._norm(out, f"{self.family.layer(i)}.{post_norm}")
        total = self.g.op("Add", x, self._times(out, self.spec.residual_factor), name="residual")
        return self._norm(total, norm) if norm and not self.spec.norm_first else total

    def _times(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1 else self.g.op("Mul", x, self.g.scalar(factor))

    def _norm(self, x: ir.Value, path: str) -> ir.Value:
        """Return the norm over the last axis; mean and root are float32 in every graph, as in transformers."""
        g, eps = self.g, self.spec.norm_eps
        wide = g.to_float32(x)
        if self.family.norm == "layer":
            parts = [self._tensor(f"{path}.{part}", ir.DataType.FLOAT) for part in ("weight", "bias")]
            return g.from_float32(g.op("LayerNormalization", wide, *parts, axis=-1, epsilon=eps))
        mean = g.reduce_mean_last(g.op("Pow", wide, g.constant(np.array(2, dtype=np.float32))))
        root = g.op("Sqrt", g.op("Add", mean, g.constant(np.array(eps, dtype=np.float32))))
        normed, offset = g.op("Div", wide, root), self.family.norm_offset
        if offset:
            # In float16, 1 + w would round a small w away.
            return g.from_float32(g.op("Mul", normed, self._tensor(f"{path}.weight", ir.DataType.FLOAT, offset)))
        return g.op("Mul", g.from_float32(normed), self._tensor(f"{path}.weight"))

    def _linear(self, site: Site, x: ir.Value) -> ir.Value:
        """Append the linears of a Site, behind its rotation if it has one, and quantized if it has a scale."""
        packed = PackedLinear(site, self.sites[site], self.weights)
        if block := self.rotations.get(site):
            x = add_rotation(self.g, x, block, packed.in_features)
        return add_linear(self.g, x, packed, self.scales.get(site), DTYPES[self.form.scale_dtype])

    def _project(self, path: str | None, x: ir.Value) -> ir.Value:
        """Return ``x`` through a linear that is never quantized, or ``x`` itself if the model has no such linear."""
        if path is None or f"{path}.weight" not in self.weights.names():
            return x
        return add_linear(self.g, x, PackedLinear(Site(path), (path,), self.weights), None)

    @property
    def _has_logits_start(self) -> bool:
        """Whether there is ``logits_start``: the engines of 16-bit and static graphs have no optional inputs."""
        return self.form.dtype == "float32" and not self.form.capacity

    def _logits(self, x: ir.Value) -> ir.Value:
        """Return logits float32 ``[B, S, vocab]`` of the last hidden states.

        With ``logits_start``, an optional input, only those from that token on: a prompt needs the logits of its last
        token alone, and the head of a small model is a fifth of the work.
        """
        g, cap = self.g, self.spec.logit_cap
        g.scope("head")
        if self._has_logits_start:
            start = g.optional_input("logits_start", np.zeros(1, dtype=np.int64))
            x = g.op("Slice", x, start, g.ints(np.iinfo(np.int64).max), g.ints(1))
        if f"{self.family.final_norm}.weight" in self.weights.names():
            x = self._norm(x, self.family.final_norm)
        logits = self._times(self._head(self._project(self.family.embedding_out, x)), 1 / self.spec.logit_divisor)
        if cap:
            limit = g.scalar(cap)
            logits = g.op("Mul", g.op("Tanh", g.op("Div", logits, limit)), limit)
        return g.to_float32(logits)

    def _head(self, x: ir.Value) -> ir.Value:
        """Return logits of the graph's type; a tied head reads the stored embedding."""
        tied = self.spec.tied_head or f"{self.family.head}.weight" not in self.weights.names()
        scale, scale_dtype = self.scales.get(HEAD_SITE), DTYPES[self.form.scale_dtype]
        if tied and scale is None:
            # logits_start may leave no tokens.
            return self.embedding.scores(x, may_be_empty=self._has_logits_start)
        packed = PackedLinear(HEAD_SITE, (self.family.embedding if tied else self.family.head,), self.weights)
        return add_linear(self.g, x, packed, scale, scale_dtype)

    def _tensor(self, name: str, dtype: ir.DataType | None = None, offset: float = 0.0) -> ir.Value:
        """Return a tensor of the model plus ``offset`` as an initializer, of the graph's type unless given."""
        element, shape = dtype or self.g.dtype, self.weights.shape(name)

        def load() -> npt.NDArray[Any]:
            array = np.empty(shape, element.numpy())
            for rows, block in blocks(self.weights, name):
                array[rows] = block + np.float32(offset)
            return array

        return self.g.lazy(name, element, shape, load)
