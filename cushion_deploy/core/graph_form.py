"""The form of an exported graph: types, key/value cache, place of the prefix, opset; and which forms are invalid."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from cushion_deploy.core.dtypes import Dtype
from cushion_deploy.core.graphs import GraphContract, PrefixMode
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import EMBEDDING_BLOCK, QuantScheme
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.store.digests import digest_json

CacheForm = Literal["growing", "static", "int8"]
MIN_OPSET, MAX_OPSET = 17, 22
"""TensorRT reads opset 17 from 10.3 on. Above 22, operators of the graph change their meaning or are untested."""
STATIC_OPSET = 24
"""Opset of a graph with a static cache: the first with TensorScatter, and its Attention agrees with opset 23. The other
changes since 22 (Cast, Reshape, Shape, Transpose, Squeeze, Unsqueeze, Identity, QuantizeLinear, DequantizeLinear) only
add types, and attributes that the graph leaves at their defaults."""
BLOCK_OPSET = 21
"""Opset of a float32 graph with an INT8 embedding: the first whose DequantizeLinear has scales by block."""
_FLOAT16_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class GraphForm:
    """The form of a graph, independent of the model and the quantization.

    Attributes:
        dtype: type of the activations, of a floating-point cache and of floating-point weights.
        quantized: whether linears are quantized; False writes the float twin.
        cache: ``growing`` appends new keys and values to the past, ``static`` updates a cache of fixed capacity in
            place, ``int8`` grows and stores INT8 codes.
        capacity: slots of a static cache, including those of the prefix; 0 for the other two.
        prefix: ``baked`` stores the prefix in the graph; ``cache`` writes it to a file next to the graph, and every
            caller starts its cache with it; an empty prefix changes nothing in either. ``none`` rejects a prefix.
        opset: opset of the default domain; ignored for a static cache, which uses :data:`STATIC_OPSET`.
        scale_dtype: type of the scales and of quantized products. Only float32 is for deployment: a float16 accumulator
            can overflow.
        gathers_codes: whether a float32 graph stores an INT8 embedding as codes. False, and in 16-bit graphs, it stores
            the dequantized table.

    Raises:
        UsageError: a value is out of range, or two values exclude each other.
    """

    dtype: Dtype = "float32"
    quantized: bool = True
    cache: CacheForm = "growing"
    capacity: int = 0
    prefix: PrefixMode = "baked"
    opset: int = MIN_OPSET
    scale_dtype: Dtype = "float32"
    gathers_codes: bool = True

    def __post_init__(self) -> None:
        for what, value, known in (
            ("graph type", self.dtype, Dtype),
            ("scale type", self.scale_dtype, Dtype),
            ("cache", self.cache, CacheForm),
            ("place of the prefix", self.prefix, PrefixMode),
        ):
            if value not in get_args(known):
                raise unknown_choice(what, str(value), list(get_args(known)))
        if not MIN_OPSET <= self.opset <= MAX_OPSET:
            raise UsageError(f"opset {self.opset} is not supported", hint=f"choose {MIN_OPSET} to {MAX_OPSET}")
        if self.cache == "int8" and self.capacity:
            raise UsageError("an INT8 cache cannot be static", hint="drop the capacity, or export.kv_cache=int8")
        if self.cache == "growing" and self.capacity:
            raise UsageError(
                f"a growing cache has no capacity, but {self.capacity} slots were given", hint="use a static cache"
            )
        if self.cache == "static" and self.capacity < 1:
            raise UsageError(
                f"a static cache of {self.capacity} slots cannot hold a token",
                hint="increase its capacity with tensorrt.max_context",
            )

    def check(self, spec: ModelSpec, quantization: Quantization) -> None:
        """Check that a model and its quantization can be exported in this form.

        Raises:
            UsageError: the prefix or the cache scales are for another model or another place of the prefix, scales
                are missing, the capacity does not fit, or the prefix exceeds the range of float16.
        """
        prefix = quantization.prefix
        if self.holds_codes(quantization.scheme):
            require_blocks(spec)
        if prefix.model_digest != spec.weights_digest:
            raise UsageError("the prefix was made for another model", hint="run `cushion-deploy search` for this model")
        if self.quantized and quantization.scales is None:
            raise UsageError(
                "a quantized graph needs activation scales, but there are none",
                hint="run `cushion-deploy calibrate` for this model and prefix, or export the float twin",
            )
        if self.prefix == "none" and prefix.length:
            raise UsageError(
                f"a prefix of {prefix.length} positions was given, but the form of the graph excludes a prefix",
                hint="set export.prefix to baked or cache, or give an empty prefix",
            )
        if self.cache == "static":
            self._check_capacity(spec, prefix)
        if self.cache == "int8":
            self._check_kv_scales(spec, quantization)
        if self.dtype == "float16":
            _check_float16(prefix)

    def _check_capacity(self, spec: ModelSpec, prefix: Prefix) -> None:
        if prefix.length and not self._caches(prefix):
            raise UsageError(
                "a static cache cannot be combined with a prefix inside the graph",
                hint="put the prefix into the cache: --set export.prefix=cache",
            )
        if not prefix.length < self.capacity <= spec.max_positions:
            raise UsageError(
                f"a static cache of {self.capacity} slots does not fit a prefix of {prefix.length} and a model of "
                f"{spec.max_positions} positions",
                hint=f"give {prefix.length + 1} to {spec.max_positions} slots with tensorrt.max_context",
            )

    def _check_kv_scales(self, spec: ModelSpec, quantization: Quantization) -> None:
        scales = quantization.kv_scales
        if scales is None:
            raise UsageError(
                "an INT8 cache needs cache scales, but there are none",
                hint="run `cushion-deploy calibrate --kv-cache int8` for this model and prefix",
            )
        if scales.keys.shape != (spec.num_layers, spec.num_kv_heads):
            raise UsageError("the cache scales were made for another model", hint="calibrate the cache for this model")
        if scales.with_prefix != self._caches(quantization.prefix):
            where = ("inside the graph", "in the cache")
            raise UsageError(
                f"the cache scales are for a prefix {where[scales.with_prefix]}, but it is "
                f"{where[not scales.with_prefix]}",
                hint="calibrate the cache again with this setting of export.prefix",
            )

    def _caches(self, prefix: Prefix) -> bool:
        """Whether every cache starts with this prefix."""
        return self.prefix == "cache" and prefix.length > 0

    def select(self, quantization: Quantization) -> Quantization:
        """Return the parts of a quantization that a graph of this form contains."""
        return replace(
            quantization,
            scales=quantization.scales if self.quantized else None,
            kv_scales=quantization.kv_scales if self.cache == "int8" else None,
        )

    def contract(self, spec: ModelSpec, prefix: Prefix) -> GraphContract:
        """Return the inputs and outputs of a graph of this form."""
        return GraphContract(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            vocab_size=spec.vocab_size,
            max_positions=spec.max_positions,
            dtype=self.dtype,
            prefix_length=prefix.length,
            prefix_in_cache=self._caches(prefix),
            cache_capacity=self.capacity,
            quantized_cache=self.cache == "int8",
        )

    @property
    def float_twin(self) -> GraphForm:
        """The same form without any quantization; a cache of INT8 codes becomes a growing one in floating point."""
        return replace(self, quantized=False, cache="growing" if self.cache == "int8" else self.cache)

    @property
    def effective_opset(self) -> int:
        """The opset that the graph is written for."""
        return STATIC_OPSET if self.cache == "static" else self.opset

    def holds_codes(self, scheme: QuantScheme) -> bool:
        """Return whether a graph of this form stores the token embedding as INT8 codes."""
        return self.quantized and scheme.int8_embedding and self.gathers_codes and self.dtype == "float32"

    def opset_of(self, scheme: QuantScheme) -> int:
        """Return the opset of a graph of this form: at least :data:`BLOCK_OPSET` if it stores an INT8 embedding."""
        return max(self.effective_opset, BLOCK_OPSET) if self.holds_codes(scheme) else self.effective_opset

    @property
    def digest(self) -> str:
        """SHA-256 over the fields."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


def _check_float16(prefix: Prefix) -> None:
    largest = max(float(np.abs(part).max(initial=0.0)) for part in (prefix.keys, prefix.values))
    if largest > _FLOAT16_MAX:
        raise UsageError(
            f"the prefix reaches {largest:,.0f}, but the float16 maximum is {_FLOAT16_MAX:,.0f}",
            hint="compile plans with --plan-dtype bf16",
        )


def require_blocks(spec: ModelSpec) -> None:
    """Check that the rows of a model's embedding are whole blocks; raises UsageError if they are not."""
    width = spec.embedding_size or spec.hidden_size
    if width % EMBEDDING_BLOCK:
        raise UsageError(
            f"an INT8 embedding has blocks of {EMBEDDING_BLOCK} values, and rows of this model have {width}",
            hint="set export.embedding to auto or float",
        )
