"""One linear of extreme codes: INT8 products whose sums show whether a library adds them exactly.

x86 without VNNI adds pairs of products of uint8 and int8 in 16 bits, which saturate there without any message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.fakequant import Int8Array

ROWS = (1, 2, 5, 16, 33, 130)
"""Rows of the products: vectors, and matrices below and above the tiles of the kernels."""
INPUTS, OUTPUTS = 256, 80


def extreme_weights() -> Int8Array:
    """Return weight codes at the ends of their range, int8 ``[INPUTS, OUTPUTS]``."""
    weights = np.random.default_rng(0).choice(np.array([-127, 127], dtype=np.int8), (INPUTS, OUTPUTS))
    # One column where all products have one sign: the sum is as large as it can be.
    weights[:, 0] = 127
    return weights


def extreme_products(multiply: Callable[[FloatArray], FloatArray]) -> Iterator[tuple[Int8Array, FloatArray]]:
    """Yield activation codes int8 ``[rows, INPUTS]``, and what a library computes of them, ``[rows, OUTPUTS]``.

    Args:
        multiply: runs the linear of :func:`extreme_weights` on codes as float32 ``[rows, INPUTS]``.
    """
    rng = np.random.default_rng(1)
    for rows in ROWS:
        codes = rng.choice(np.array([-127, 127, 126], dtype=np.int8), (rows, INPUTS))
        codes[0] = 127
        yield codes, multiply(codes.astype(np.float32))


def is_exact(codes: Int8Array, weights: Int8Array, found: FloatArray) -> bool:
    """Return whether ``found`` are the products of ``codes`` and ``weights`` in integer arithmetic."""
    return np.array_equal(found, codes.astype(np.int64) @ weights.astype(np.int64))
