"""The rounding rule of the project as a numpy oracle: half to even, as in ONNX QuantizeLinear.

Every other implementation (torch simulation, ONNX Q/DQ, engines) is tested against this file.

- Symmetric, used for deployment: s = amax / (2^(N-1) - 1), zero point 0, codes in [-2^(N-1), 2^(N-1) - 1].
- Asymmetric, used for evaluation: s = (max - min) / (2^N - 1), a rounded zero point, codes in [0, 2^N - 1]. The range
  always includes zero, so that zero is represented exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import UsageError

Int8Array = npt.NDArray[np.int8]
UInt8Array = npt.NDArray[np.uint8]
BITS = (8, 6, 4)
"""Supported widths of codes, in bits."""


def qmax(bits: int) -> int:
    """Return the largest code, 2^(bits-1) - 1."""
    return int(2 ** (bits - 1)) - 1


def symmetric_scale(amax: float, bits: int = 8) -> float:
    """Return the float32 scale that maps ``amax`` to the largest code, as a Python float."""
    return float(np.float32(amax) / np.float32(qmax(bits)))


def quantize(x: FloatArray, scale: FloatArray | float, bits: int = 8) -> Int8Array:
    """Return integer codes of ``x``: round-half-even of x / scale, saturated. ``scale`` broadcasts."""
    limit = qmax(bits)
    with np.errstate(over="ignore"):  # infinity is saturated like any other ratio
        ratio = x.astype(np.float32, copy=False) / np.asarray(scale, dtype=np.float32)
    return np.clip(np.rint(ratio), -limit - 1, limit).astype(np.int8)


def dequantize(codes: Int8Array, scale: FloatArray | float) -> FloatArray:
    """Return float32 values of ``codes``; ``scale`` broadcasts."""
    return codes.astype(np.float32) * np.asarray(scale, dtype=np.float32)


def levels(bits: int) -> int:
    """Return the largest asymmetric code, 2^bits - 1."""
    return int(2**bits) - 1


def asymmetric_range(low: float, high: float, bits: int = 8) -> tuple[float, int]:
    """Return the scale (a float32 value as a Python float) and the zero point for the range from ``low`` to ``high``.

    The range is widened to include zero. An empty range has scale 0, by which nothing can be divided.
    """
    least, most = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    scale = np.float32((most - least) / np.float32(levels(bits)))
    if scale == 0:
        return 0.0, 0
    return float(scale), int(np.clip(np.rint(-least / scale), 0, levels(bits)))


def quantize_asymmetric(
    x: FloatArray, scale: FloatArray | float, zero_point: npt.NDArray[Any] | int, bits: int = 8
) -> UInt8Array:
    """Return codes: round-half-even of x / scale, plus the zero point, saturated. Scale and zero point broadcast."""
    ratio = x.astype(np.float32, copy=False) / np.asarray(scale, dtype=np.float32)
    shifted: FloatArray = np.rint(ratio) + np.asarray(zero_point, dtype=np.float32)
    return np.clip(shifted, 0, levels(bits)).astype(np.uint8)


def dequantize_asymmetric(
    codes: UInt8Array, scale: FloatArray | float, zero_point: npt.NDArray[Any] | int
) -> FloatArray:
    """Return float32 values of asymmetric codes."""
    centered = codes.astype(np.float32) - np.asarray(zero_point, dtype=np.float32)
    return centered * np.asarray(scale, dtype=np.float32)


def quantize_weight(weight: FloatArray, name: str, bits: int = 8, group: int = 0) -> tuple[Int8Array, FloatArray]:
    """Quantize the weight of a linear symmetrically, per output channel or per group of input features in a channel.

    Args:
        weight: float32 ``[out_features, in_features]``.
        name: tensor name, for the error.
        bits: width of the codes.
        group: number of input features that share a scale; the last group of a channel may be smaller. 0 for all.

    Returns:
        Codes int8 ``[out_features, in_features]`` and scales float32 ``[out_features]``; with groups the scales are
        ``[out_features, ceil(in_features / group)]``. A channel or group of zeros gets scale 1, because its codes are
        zero in any case and TensorRT aborts on a zero scale (issue 4446).

    Raises:
        UsageError: the weight contains NaN or infinity.
    """
    scale = weight_scale(weight, name, bits, group)
    return quantize(weight, spread(scale, weight.shape[1], group), bits), scale


def weight_scale(weight: FloatArray, name: str, bits: int = 8, group: int = 0) -> FloatArray:
    """Return the scales that :func:`quantize_weight` uses for a weight."""
    magnitude = np.abs(weight)
    if not np.isfinite(magnitude).all():
        raise UsageError(
            f"weight {name} contains NaN or infinity", hint="the checkpoint is damaged; fetch the model again"
        )
    if group:
        amax = np.maximum.reduceat(magnitude, np.arange(0, weight.shape[1], group), axis=1)
    else:
        amax = magnitude.max(axis=1)
    scale: FloatArray = (amax / np.float32(qmax(bits))).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = np.float32(1.0)
    return scale


def spread(scale: FloatArray, in_features: int, group: int = 0) -> FloatArray:
    """Return the scales of :func:`quantize_weight` in a shape that broadcasts against its codes."""
    return np.repeat(scale, group, axis=1)[:, :in_features] if group else scale[:, None]
