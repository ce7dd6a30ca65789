"""Access to the weights of a model for export: by name and in blocks of rows, never the whole model at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from cushion_deploy.core.dtypes import FloatArray

BLOCK_BYTES = 16 * 2**20
"""Size of a block in float32, in which tensors are read, folded and quantized."""


class WeightSource(Protocol):
    """Named weight tensors that can be read in pieces, so that export never holds a second copy of the model."""

    def names(self) -> frozenset[str]:
        """Return the names of all tensors, as in the module."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it; raises KeyError for an unknown name."""
        ...

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Return ``tensor[start:stop]`` as float32; raises KeyError for an unknown name."""
        ...


def whole(weights: WeightSource, name: str) -> FloatArray:
    """Return one tensor as float32; raises KeyError for an unknown name."""
    return weights.rows(name, 0, weights.shape(name)[0])


def blocks(weights: WeightSource, name: str) -> Iterator[tuple[slice, FloatArray]]:
    """Yield a tensor in order, as float32 blocks of whole rows of about ``BLOCK_BYTES``, each with its rows."""
    count, *rest = weights.shape(name)
    row_bytes = 4
    for size in rest:
        row_bytes *= size
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), weights.rows(name, start, stop)
