"""Rotations of Site inputs: block-diagonal Hadamard transforms, which spread the spike of one channel over a block.

The inverse of a rotation is folded into the weights behind the Site, so that the model computes the same function.
A block of 512 is computed as the Kronecker product of a 16 x 16 and a 32 x 32 matrix, which takes 48 multiplications a
value instead of 512.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from cushion_deploy.core.dtypes import FloatArray

DENSE = 64
"""Largest matrix of a rotation; a larger block is a Kronecker product of several."""
SMALLEST = 2
"""Smallest block that is a rotation at all."""


def rotation_block(width: int, limit: int) -> int:
    """Return the largest power of two that divides ``width`` and is at most ``limit``; 0 if that is 1 or less."""
    block = min(width & -width, 1 << (limit.bit_length() - 1) if limit > 0 else 0)
    return block if block >= SMALLEST else 0


def kronecker_factors(block: int) -> tuple[int, ...]:
    """Return the orders of the Hadamard matrices whose Kronecker product is the one of order ``block``, a power of two.

    As few as possible, each at most :data:`DENSE`, and as equal as possible, in ascending order: 512 is 16 x 32, which
    ONNX Runtime computes in four fifths of the time of 8 x 64.
    """
    bits = block.bit_length() - 1
    count = max(1, -(-bits // (DENSE.bit_length() - 1)))
    return tuple(1 << ((bits + place) // count) for place in range(count))


def signs(order: int) -> FloatArray:
    """Return the Hadamard matrix of Sylvester's construction, entries +1 and -1, float32 ``[order, order]``.

    It is symmetric, and its product with itself is ``order`` times the identity.
    """
    index = np.arange(order)
    # The number of common one bits of row and column decides the sign.
    common = np.bitwise_count(index[:, None] & index[None, :])
    found: FloatArray = np.where(common % 2, -1, 1).astype(np.float32)
    return found


def hadamard(order: int) -> FloatArray:
    """Return the orthogonal Hadamard matrix, float32 ``[order, order]``; it is its own inverse."""
    found: FloatArray = signs(order) / np.float32(math.sqrt(order))
    return found


def rotate(x: Any, block: int, matrix: Callable[[int], Any]) -> Any:
    """Return ``x`` with each block of the last axis multiplied by the Hadamard matrix of order ``block``.

    Args:
        x: array or tensor ``[..., n * block]``.
        block: a power of two.
        matrix: the Hadamard matrix of an order, of the same kind and type as ``x``, in any normalization.
    """
    y, inner = x, 1
    for order in reversed(kronecker_factors(block)):
        if inner == 1:
            y = y.reshape(*x.shape[:-1], -1, order) @ matrix(order)
        else:
            y = matrix(order) @ y.reshape(*x.shape[:-1], -1, order, inner)
        inner *= order
    return y.reshape(x.shape)
