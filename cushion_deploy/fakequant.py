"""The one rounding rule, as a numpy oracle: symmetric, zero point 0, half to even.

Every other implementation (torch simulation, ONNX Q/DQ, engines) is tested against this file.
Scale: METHOD section 2, s = amax / (2^(N-1) - 1); codes in [-2^(N-1), 2^(N-1) - 1]; rounding as
ONNX QuantizeLinear specifies it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cushion_deploy.errors import UsageError
from cushion_deploy.types import FloatArray

Int8Array = npt.NDArray[np.int8]


def qmax(bits: int) -> int:
    """Return the largest code, 2^(bits-1) - 1."""
    return int(2 ** (bits - 1)) - 1


def symmetric_scale(amax: float, bits: int = 8) -> float:
    """Return the float32 scale that maps ``amax`` to the largest code, as a Python float."""
    return float(np.float32(amax) / np.float32(qmax(bits)))


def quantize(x: FloatArray, scale: FloatArray | float, bits: int = 8) -> Int8Array:
    """Return integer codes of ``x``: round-half-even of x / scale, saturated. ``scale`` broadcasts."""
    limit = qmax(bits)
    ratio = x.astype(np.float32, copy=False) / np.asarray(scale, dtype=np.float32)
    return np.clip(np.rint(ratio), -limit - 1, limit).astype(np.int8)


def dequantize(codes: Int8Array, scale: FloatArray | float) -> FloatArray:
    """Return float32 values of ``codes``; ``scale`` broadcasts."""
    return codes.astype(np.float32) * np.asarray(scale, dtype=np.float32)


def quantize_weight(weight: FloatArray, name: str) -> tuple[Int8Array, FloatArray]:
    """Quantize a linear's weight per output channel.

    Args:
        weight: float32 ``[out_features, in_features]``.
        name: tensor name, for the error.

    Returns:
        codes int8 ``[out_features, in_features]`` and scales float32 ``[out_features]``. A channel of
        zeros gets scale 1: its codes are zero, and TensorRT aborts on a zero scale (issue 4446).

    Raises:
        UsageError: the weight holds NaN or infinity.
    """
    if not np.isfinite(weight).all():
        raise UsageError(
            f"weight {name} contains NaN or infinity", hint="the checkpoint is damaged; fetch the model again"
        )
    amax = np.abs(weight).max(axis=1)
    scale = (amax / np.float32(qmax(8))).astype(np.float32)
    scale[scale < np.finfo(np.float32).tiny] = np.float32(1.0)
    return quantize(weight, scale[:, None]), scale
