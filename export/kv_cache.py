"""The key/value cache of the graph: growing, growing as INT8 codes, or static and updated in place.

Shapes in comments: B batch, S sequence, T past + S, K key/value heads, D head size. In a static cache T is its
capacity.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.kv_scales import KV_PARTS, KvPart, KvScales, kv_site
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import codes_name

SWAP_LAST_AXES = [0, 1, 3, 2]
"""Permutation that transposes the matrices of a 4-D tensor."""


class KvCache(ABC):
    """Past keys and values in, present ones out.

    Attributes:
        g: the graph.
        capacity: slots of a static cache; 0 for one that grows.
    """

    capacity: int = 0

    def __init__(self, g: GraphBuilder, spec: ModelSpec) -> None:
        """Declare the past of every layer as a graph input."""
        self.g = g
        self._heads, self._size = spec.num_kv_heads, spec.head_dim
        self._past = {
            (layer, part): g.input(f"past_key_values.{layer}.{part}", self.element, self._shape("past"))
            for layer in range(spec.num_layers)
            for part in KV_PARTS
        }

    @property
    def element(self) -> ir.DataType:
        """Type of past and present."""
        return self.g.dtype

    def update(self, layer: int, part: KvPart, new: ir.Value) -> ir.Value:
        """Add new keys or values ``[B, K, S, D]`` to the past, and declare the result as a graph output.

        Returns:
            The present ``[B, K, T, D]``, as the cache stores it.
        """
        present = self._append(layer, part, self._past[layer, part], new)
        self.g.output(present, f"present.{layer}.{part}", self.element, self._shape("total"))
        return present

    @abstractmethod
    def _append(self, layer: int, part: KvPart, past: ir.Value, new: ir.Value) -> ir.Value: ...

    def read(self, layer: int, part: KvPart, present: ir.Value) -> ir.Value:
        """Return stored keys or values in the graph's floating-point type; the axes stay as they are."""
        return present

    def read_transposed(self, layer: int, present: ir.Value) -> ir.Value:
        """Return keys ``[B, K, D, T]`` in floating point; INT8 codes are transposed before they are dequantized.

        ONNX Runtime puts Q and DQ around a Transpose that follows a DQ, over the whole cache at every step: decoding
        SmolLM2 after 1,536 tokens then runs at 0.92 of the speed of a floating-point cache, and at 1.08 this way.
        """
        return self.read(layer, "key", self.g.op("Transpose", present, perm=SWAP_LAST_AXES))

    def _shape(self, length: str) -> list[int | str]:
        return ["batch", self._heads, self.capacity or length, self._size]


class GrowingCache(KvCache):
    """A floating-point cache to which every step appends."""

    def _append(self, layer: int, part: KvPart, past: ir.Value, new: ir.Value) -> ir.Value:
        return self.g.op("Concat", past, new, axis=2)


class Int8Cache(KvCache):
    """A growing cache of INT8 codes; a code is written once and never changes.

    Scales and casts are float32 in a 16-bit graph too, as they are at Sites.
    """

    def __init__(self, g: GraphBuilder, spec: ModelSpec, scales: KvScales) -> None:
        """Declare the past; ``scales`` has one scale per head, or one per layer."""
        super().__init__(g, spec)
        self._scales = scales

    @property
    def element(self) -> ir.DataType:
        """INT8."""
        return ir.DataType.INT8

    def _append(self, layer: int, part: KvPart, past: ir.Value, new: ir.Value) -> ir.Value:
        wide = self.g.to_float32(new)
        scale, zero_point, axis = self._parameters(layer, part)
        codes = self.g.op("QuantizeLinear", wide, scale, zero_point, name="Q", **axis)
        codes.name = codes_name(kv_site(layer, part))
        return self.g.op("Concat", past, codes, axis=2)

    def read(self, layer: int, part: KvPart, present: ir.Value) -> ir.Value:
        """Dequantize stored keys or values."""
        scale, zero_point, axis = self._parameters(layer, part)
        return self.g.from_float32(self.g.op("DequantizeLinear", present, scale, zero_point, name="DQ", **axis))

    def _parameters(self, layer: int, part: KvPart) -> tuple[ir.Value, ir.Value, dict[str, int]]:
        """Return scale and zero point, ``[K]`` or scalars, and the axis attribute of those per head."""
        scale = self._scales.of(layer, part)
        shared = self._scales.granularity == "per-tensor"
        if shared:
            scale = scale[0].reshape(())
        value = self.g.constant(scale, f"{kv_site(layer, part)}.scale")
        return value, self.g.constant(np.zeros(scale.shape, dtype=np.int8)), {} if shared else {"axis": 1}


class StaticCache(KvCache):
    """A floating-point cache of fixed capacity: new keys and values are written into their slots, nothing is copied.

    TensorRT turns TensorScatter into KVCacheUpdate where the cache is an input of the graph and the result an output,
    and binds both to one address.
    """

    def __init__(self, g: GraphBuilder, spec: ModelSpec, capacity: int) -> None:
        """Declare ``write_indices``, the slot of each row's first new token (int64 ``[B]``), and the past."""
        self.capacity = capacity
        self.write_indices = g.input("write_indices", ir.DataType.INT64, ["batch"])
        super().__init__(g, spec)

    def _append(self, layer: int, part: KvPart, past: ir.Value, new: ir.Value) -> ir.Value:
        return self.g.op("TensorScatter", past, new, self.write_indices, axis=2, mode="linear")
