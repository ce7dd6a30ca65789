"""Linears of the graph: one MatMul for all linears that share a Site, in floating point or between Q/DQ nodes."""

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

    Packing gives each Q one consumer (ONNX Runtime then fuses it) and changes no code: the linears share
    their activation scale anyway, and weight scales are per output channel.
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
        """Return the packed weight in a floating-point type, ``[in, sum(out)]``."""
        packed = np.empty((self.in_features, sum(self.out_features)), dtype)
        for columns, _, block in self._blocks():
            packed[:, columns] = block.T
        return packed

    def bias(self) -> FloatArray:
        """Return the packed bias, float32 ``[sum(out)]``; zeros for a linear that has none."""
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
        """Yield blocks of output channels: their columns in the packed weight, the linear, ``[some of out, in]``."""
        begin = 0
        for path, count in zip(self.paths, self.out_features, strict=True):
            for rows, block in blocks(self.weights, f"{path}.weight"):
                yield slice(begin + rows.start, begin + rows.stop), path, block
            begin += count


def add_linear(
    g: GraphBuilder,
    x: ir.Value,
    linear: PackedLinear,
    dtype: ir.DataType,
    scale: float | None,
    scale_dtype: ir.DataType = ir.DataType.FLOAT,
) -> ir.Value:
    """Append a packed linear.

    With ``scale`` None it is a floating-point MatMul. Otherwise Q -> DQ stands on the input and DQ on an INT8
    weight ``[in, out]`` with a scale per output channel, as TensorRT and ONNX Runtime fuse them. Scales,
    accumulator and product stay float32 in a float16 graph by default: a half accumulator can overflow.

    Args:
        g: the graph.
        x: input ``[batch, sequence, in]`` of type ``dtype``.
        linear: the packed linears.
        dtype: floating-point type of the graph.
        scale: static activation scale, or None.
        scale_dtype: type of scales, and with it of the product.

    Returns:
        ``[batch, sequence, sum(out)]`` of type ``dtype``.
    """
    size = (linear.in_features, sum(linear.out_features))
    if scale is None:
        weight = g.lazy(f"{linear.site}.weight", dtype, size, lambda: linear.weight(dtype.numpy()))
        y = g.op("MatMul", x, weight, name="MatMul")
        return _add_bias(g, y, linear, dtype)
    wide = x if dtype == scale_dtype else g.op("Cast", x, to=int(scale_dtype))
    zero = g.constant(np.array(0, dtype=np.int8), "zero_point")
    step = g.constant(np.array(scale, dtype=scale_dtype.numpy()), f"{linear.site}.scale")
    codes = g.op("QuantizeLinear", wide, step, zero, name="Q")
    codes.name = codes_name(linear.site)
    inputs = g.op("DequantizeLinear", codes, step, zero, name="DQ")
    weight_codes = g.lazy(f"{linear.site}.weight_codes", ir.DataType.INT8, size, linear.codes)
    weight_scales = g.constant(linear.scales().astype(scale_dtype.numpy()), f"{linear.site}.weight_scales")
    # Not shared between weights: ONNX Runtime's conversion to uint8 weights fails on a shared zero point.
    weight_zeros = g.constant(np.zeros(size[1], dtype=np.int8), f"{linear.site}.weight_zero_points")
    weight = g.op("DequantizeLinear", weight_codes, weight_scales, weight_zeros, name="weight_DQ", axis=1)
    y = g.op("MatMul", inputs, weight, name="MatMul")
    y = _add_bias(g, y, linear, scale_dtype)
    return y if dtype == scale_dtype else g.op("Cast", y, to=int(dtype))


def codes_name(site: Site) -> str:
    """Return the name of the int8 tensor that enters a Site's linears."""
    return f"{site}.codes"


def _add_bias(g: GraphBuilder, y: ir.Value, linear: PackedLinear, dtype: ir.DataType) -> ir.Value:
    if not linear.has_bias:
        return y
    return g.op("Add", y, g.constant(linear.bias().astype(dtype.numpy()), f"{linear.site}.bias"))
