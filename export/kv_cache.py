"""The key/value cache of the graph: in its floating-point type, or INT8 codes behind Q and before DQ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from cushion_deploy.core.kv_scales import KvPart, KvScales, kv_site
from cushion_deploy.export.builder import GraphBuilder
from cushion_deploy.export.linear import codes_name

TURNED = [0, 1, 3, 2]


@dataclass(frozen=True)
class KvCache:
    """Past in, present out.

    An INT8 cache is written once and read by every later step as it is. Scale and cast are float32 in a float16
    graph too, as they are at Sites.

    Attributes:
        scales: of INT8 codes; None for a cache in floating point, which leaves no trace.
        dtype: floating-point type of the graph.
    """

    scales: KvScales | None
    dtype: ir.DataType

    @property
    def element(self) -> ir.DataType:
        """Type of past and present."""
        return self.dtype if self.scales is None else ir.DataType.INT8

    def present(self, g: GraphBuilder, layer: int, part: KvPart, past: ir.Value, new: ir.Value) -> ir.Value:
        """Return the past with new keys or values behind it, ``[B, K, T, D]`` as the cache keeps them."""
        if self.scales is not None:
            wide = new if self.dtype == ir.DataType.FLOAT else g.op("Cast", new, to=int(ir.DataType.FLOAT))
            grid, axis = _grid(g, self.scales, layer, part)
            new = g.op("QuantizeLinear", wide, *grid, name="Q", **axis)
            new.name = codes_name(kv_site(layer, part))
        return g.op("Concat", past, new, axis=2)

    def read(self, g: GraphBuilder, layer: int, part: KvPart, present: ir.Value) -> ir.Value:
        """Return keys or values in the graph's floating-point type, in the axes of ``present``."""
        if self.scales is None:
            return present
        grid, axis = _grid(g, self.scales, layer, part)
        wide = g.op("DequantizeLinear", present, *grid, name="DQ", **axis)
        return wide if self.dtype == ir.DataType.FLOAT else g.op("Cast", wide, to=int(self.dtype))

    def read_turned(self, g: GraphBuilder, layer: int, present: ir.Value) -> ir.Value:
        """Return keys ``[B, K, D, T]`` in floating point, the codes turned before they become numbers.

        ONNX Runtime puts Q and DQ around a Transpose that stands behind a DQ, over the whole cache at every step:
        decoding SmolLM2 behind 1,536 tokens then has 0.92 of the speed of a floating-point cache, and 1.08 like this.
        """
        return self.read(g, layer, "key", g.op("Transpose", present, perm=TURNED))


def _grid(
    g: GraphBuilder, scales: KvScales, layer: int, part: KvPart
) -> tuple[tuple[ir.Value, ir.Value], dict[str, int]]:
    """Return scale and zero point, one for each head or a scalar for all, and the attribute that says which."""
    scale = scales.of(layer, part)
    shared = scales.granularity == "per-tensor"
    if shared:
        scale = scale[0].reshape(())
    step = g.constant(scale, f"{kv_site(layer, part)}.scale")
    return (step, g.constant(np.zeros(scale.shape, dtype=np.int8))), {} if shared else {"axis": 1}
