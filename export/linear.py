"""Linears of the graph: one MatMul for all linears of a Site, in floating point or behind Q/DQ nodes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array, quantize_weight, weight_scale
from cushion_deploy.core.sites import Site
from cushion_deploy.core.weights import WeightSource, blocks, whole
from cushion_deploy.export.builder import GraphBuilder


@dataclass(frozen=True)
class PackedLinear:
    """Linears that share one input, packed along the output channel.

    A Q then has a single consumer, which ONNX Runtime needs to fuse it. Packing changes no INT8 code: the linears
    share their activation scale anyway, and weight scales are per output channel.

    Attributes:
        site: name of the shared input.
        paths: module paths of the linears, in the order of their output channels.
        weights: the model's tensors.
    """

    site: Site
    paths: tuple[str, ...]
    weights: WeightSource

    @cached_property
    def out_features(self) -> tuple[int, ...]:
        """Output features of each linear."""
        return tuple(self.weights.shape(f"{path}.weight")[0] for path in self.paths)

    @cached_property
    def in_features(self) -> int:
        """Input features."""
        return int(self.weights.shape(f"{self.paths[0]}.weight")[1])

    @property
    def has_bias(self) -> bool:
        """Whether any of the linears has a bias."""
        return any(f"{path}.bias" in self.weights.names() for path in self.paths)

    def weight(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """Return the packed weight ``[in, sum(out)]`` in a floating-point type."""
        packed = np.empty((self.in_features, sum(self.out_features)), dtype)
        for columns, _, block in self._blocks():
            packed[:, columns] = block.T
        return packed

    def bias(self) -> FloatArray:
        """Return the packed bias, float32 ``[sum(out)]``; zero for a linear without one."""
        names = self.weights.names()
        parts = [
            whole(self.weights, f"{path}.bias") if f"{path}.bias" in names else np.zeros(n, dtype=np.float32)
            for path, n in zip(self.paths, self.out_features, strict=True)
        ]
        return np.concatenate(parts)

    def codes(self) -> Int8Array:
        """Return the packed weight codes, int8 ``[in, sum(out)]``."""
        packed = np.empty((self.in_features, sum(self.out_features)), np.int8)
        for columns, path, block in self._blocks():
            packed[:, columns] = quantize_weight(block, path)[0].T
        return packed

    def scales(self) -> FloatArray:
        """Return the scale of each output channel, float32 ``[sum(out)]``."""
        return np.concatenate([weight_scale(block, path) for _, path, block in self._blocks()])

    def _blocks(self) -> Iterator[tuple[slice, str, FloatArray]]:
        """Yield blocks of output channels: columns of the packed weight, path of the linear, values ``[rows, in]``."""
        begin = 0
        for path, count in zip(self.paths, self.out_features, strict=True):
            for rows, block in blocks(self.weights, f"{path}.weight"):
                yield slice(begin + rows.start, begin + rows.stop), path, block
            begin += count


def add_linear(
    g: GraphBuilder,
    x: ir.Value,
    linear: PackedLinear,
    scale: float | None,
    scale_dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """Append a packed linear.

    With ``scale`` None it is one floating-point MatMul. Otherwise its input goes through Q -> DQ, and its INT8 weight
    ``[in, out]`` through a DQ with one scale per output channel: the pattern that TensorRT and ONNX Runtime fuse.
    Scales, accumulator and product stay float32 in a 16-bit graph by default, because a float16 accumulator can
    overflow.

    Args:
        g: the graph.
        x: input ``[batch, sequence, in]`` of the graph's floating-point type.
        linear: the packed linears.
        scale: static activation scale, or None.
        scale_dtype: type of scales and of the product.

    Returns:
        ``[batch, sequence, sum(out)]`` of the graph's floating-point type.
    """
    size = (linear.in_features, sum(linear.out_features))
    if scale is None:
        weight = g.lazy(f"{linear.site}.weight", g.dtype, size, lambda: linear.weight(g.dtype.numpy()))
        return _add_bias(g, g.op("MatMul", x, weight, name="MatMul"), linear, g.dtype)
    wide = g.cast(x, g.dtype, scale_dtype)
    zero = g.constant(np.array(0, dtype=np.int8), "zero_point")
    step = g.constant(np.array(scale, dtype=scale_dtype.numpy()), f"{linear.site}.scale")
    codes = g.op("QuantizeLinear", wide, step, zero, name="Q")
    codes.name = codes_name(linear.site)
    inputs = g.op("DequantizeLinear", codes, step, zero, name="DQ")
    weight_codes = g.lazy(f"{linear.site}.weight_codes", ir.DataType.INT8, size, linear.codes)
    weight_scales = g.constant(linear.scales().astype(scale_dtype.numpy()), f"{linear.site}.weight_scales")
    # Each weight has zero points of its own: ONNX Runtime's conversion to uint8 weights fails on shared ones.
    weight_zeros = g.constant(np.zeros(size[1], dtype=np.int8), f"{linear.site}.weight_zero_points")
    weight = g.op("DequantizeLinear", weight_codes, weight_scales, weight_zeros, name="weight_DQ", axis=1)
    y = _add_bias(g, g.op("MatMul", inputs, weight, name="MatMul"), linear, scale_dtype)
    return g.cast(y, scale_dtype, g.dtype)


def codes_name(site: Site) -> str:
    """Return the name of the int8 tensor that a Site's Q writes."""
    return f"{site}.codes"


def _add_bias(g: GraphBuilder, y: ir.Value, linear: PackedLinear, dtype: ir.DataType) -> ir.Value:
    if not linear.has_bias:
        return y
    return g.op("Add", y, g.constant(linear.bias().astype(dtype.numpy()), f"{linear.site}.bias"))
