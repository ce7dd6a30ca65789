"""Distances between two runs on the same tokens, in numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.sites import Site

Float64Array = npt.NDArray[np.float64]
BLOCK = 16
"""Positions whose logits are compared at once."""


@dataclass(frozen=True)
class LogitDistance:
    """Distance of logits ``b`` from a reference ``a``, both ``[..., vocab]``.

    Attributes:
        maximum, mean: largest and mean absolute difference.
        cosine: smallest cosine similarity over positions.
        kl: mean KL(a || b) over positions, in nats.
        top1: share of positions where the same token has the largest logit.
    """

    maximum: float
    mean: float
    cosine: float
    kl: float
    top1: float

    def words(self) -> str:
        """Return the distances as one line of text."""
        return (
            f"max {self.maximum:.2g}, mean {self.mean:.2g}, cosine {self.cosine:.6f}, "
            f"KL {self.kl:.2g} nats, top-1 {100 * self.top1:.2f} %"
        )


def compare_logits(a: FloatArray, b: FloatArray) -> LogitDistance:
    """Return the distance of ``b`` from the reference ``a``; NaN anywhere makes every number NaN."""
    x, y = a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1])
    # In blocks, because in float64 all logits of a large vocabulary take gigabytes.
    starts = range(0, len(x), BLOCK)
    parts = [_compare_rows(x[i : i + BLOCK].astype(np.float64), y[i : i + BLOCK].astype(np.float64)) for i in starts]
    if any(part is None for part in parts):
        return LogitDistance(*[float("nan")] * 5)
    maximum, mean, cosine, kl, top1 = (np.concatenate(rows) for rows in zip(*filter(None, parts), strict=True))
    return LogitDistance(
        float(maximum.max()), float(mean.mean()), float(cosine.min()), float(kl.mean()), float(top1.mean())
    )


def _compare_rows(x: Float64Array, y: Float64Array) -> tuple[Float64Array, ...] | None:
    """Return the five numbers of every row of ``[rows, vocab]``; None if there is NaN or infinity."""
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return None
    difference = np.abs(x - y)
    cosine = (x * y).sum(1) / np.maximum(np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1), 1e-30)
    p, q = _log_softmax(x), _log_softmax(y)
    kl = (np.exp(p) * (p - q)).sum(1)
    return difference.max(1), difference.mean(1), cosine, kl, (x.argmax(1) == y.argmax(1)).astype(np.float64)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many leading tokens two continuations have in common."""
    for i, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return i
    return min(len(a), len(b))


@dataclass(frozen=True)
class CodeDistance:
    """Distance of int8 codes at one Site: share of identical codes, and largest difference."""

    identical: float
    largest: int


Codes = Mapping[Site, npt.NDArray[np.int8]]


def compare_codes(a: Codes, b: Codes) -> dict[Site, CodeDistance]:
    """Return the distance at every Site of ``a``, in the order of ``a``."""
    found = {}
    for site, codes in a.items():
        difference = np.abs(codes.astype(np.int16) - b[site].astype(np.int16))
        found[site] = CodeDistance(float((difference == 0).mean()), int(difference.max()))
    return found


def _log_softmax(x: Float64Array) -> Float64Array:
    shifted = x - x.max(axis=1, keepdims=True)
    out: Float64Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return out
