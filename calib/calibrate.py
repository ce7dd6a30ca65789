"""Observe every Site on text behind the prefix and choose its static per-tensor scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.calib.estimators import BINS, Counts, MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import asymmetric_range, symmetric_scale
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.rotation import hadamard, kronecker_factors, rotate
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner

EXACT = 1 << 24
"""Values that are counted at once: histc counts in float32, which is exact up to this number."""


@dataclass
class SiteObserver:
    """Histogram and signed range of the input of each Site, over text tokens only.

    Attributes:
        mask: bool ``[batch, length]`` of the current batch, False on padding; None if nothing is padded.
        batch: number of the current batch, for error messages.
        histograms: the histogram of each Site so far.
    """

    mask: Tensor | None = None
    batch: int = 0
    histograms: dict[Site, MagnitudeHistogram] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one batch ``[batch, length, features]``; padding is removed first.

        Raises:
            UsageError: the batch has NaN or infinity, or only zeros and subnormal numbers.
        """
        signed = (x if self.mask is None else x[self.mask]).flatten().float()
        low, high = (float(value) for value in signed.aminmax())
        amax = max(-low, high)
        if not np.isfinite(amax):
            raise UsageError(
                f"Site {site}, calibration batch {self.batch}: NaN or infinity enters the linear",
                hint="the model overflows on this text; check the checkpoint, or calibrate on other text",
            )
        if amax < float(np.finfo(np.float32).tiny):
            raise UsageError(
                f"Site {site}, calibration batch {self.batch}: every value is zero or subnormal, so no scale exists",
                hint="the layer before it is dead; check the checkpoint",
            )
        histogram = self.histograms.setdefault(site, MagnitudeHistogram())
        histogram.cover(amax)
        histogram.widen(low, high)
        histogram.add(count_magnitudes(signed, histogram.limit))

    def begin(self, batch: int, mask: Tensor | None) -> None:
        """Describe the batch that comes next; ``mask`` int64 ``[batch, length]`` is 0 on padding."""
        self.batch, self.mask = batch, None if mask is None else mask.bool()


def count_magnitudes(values: Tensor, limit: float) -> Counts:
    """Return how many magnitudes of ``values`` ``[n]`` lie in each bin of [0, limit], int64 ``[BINS]``."""
    counts = np.zeros(BINS, dtype=np.int64)
    for part in torch.split(values, EXACT):
        counts += TorchRunner.array(torch.histc(part.abs(), bins=BINS, min=0.0, max=limit)).astype(np.int64)
    return counts


def merge_histogram(model: TorchRunner, histogram: MagnitudeHistogram) -> MagnitudeHistogram:
    """Return the histogram of all processes, given this process's own."""
    most = model.reduced(np.array([histogram.amax, histogram.high, -histogram.low]), "max")
    if most[0] == 0:
        return histogram
    merged = MagnitudeHistogram(histogram.limit, histogram.amax, histogram.counts)
    merged.cover(float(most[0]))
    counts = model.reduced(merged.counts, "sum")
    return MagnitudeHistogram(merged.limit, float(most[0]), counts, -float(most[2]), float(most[1]))


@torch.inference_mode()
def observe_sites(
    model: TorchRunner,
    prefix: Prefix,
    ids: IntArray,
    mask: IntArray,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
) -> dict[Site, MagnitudeHistogram]:
    """Return the histogram of every Site, the head included.

    Args:
        model: the model.
        prefix: precedes every window and is not observed.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        batch_size: windows per forward pass.
        progress: where to report the number of windows done.
    """
    batches, observer = model.batches(ids, mask, batch_size), SiteObserver()
    with observed(model, observer):
        model.sweep(
            batches,
            model.past(prefix),
            before=lambda number: observer.begin(number, batches[number].mask),
            progress=progress,
            task="observing Sites",
        )
    found = {site: observer.histograms.get(site, MagnitudeHistogram()) for site in model.sites}
    return {site: merge_histogram(model, histogram) for site, histogram in found.items()}


@torch.inference_mode()
def observe_rotated(
    model: TorchRunner,
    prefix: Prefix,
    ids: IntArray,
    mask: IntArray,
    rotations: Mapping[Site, int],
    *,
    batch_size: int = 4,
    progress: Progress = silent,
) -> tuple[dict[Site, MagnitudeHistogram], dict[Site, MagnitudeHistogram]]:
    """Return the histogram of every Site as it is, and as it would be with rotations, from one pass.

    Args:
        model: the model, without these rotations.
        prefix, ids, mask, batch_size, progress: see :func:`observe_sites`.
        rotations: Site to the block size of its rotation.
    """
    orders = {order for block in rotations.values() for order in kronecker_factors(block)}
    matrices = {order: model.tensor(hadamard(order)).to(model.dtype) for order in orders}
    rotated = SiteObserver()

    def rotate_and_count(site: Site, x: Tensor) -> None:
        given = model.current.mask
        rotated.mask = None if given is None else given.bool()
        rotated(site, rotate(x, rotations[site], matrices.__getitem__))

    with observed(model, rotate_and_count, {site: model.sites[site] for site in rotations}):
        found = observe_sites(model, prefix, ids, mask, batch_size=batch_size, progress=progress)
    own = {site: rotated.histograms.get(site, MagnitudeHistogram()) for site in rotations}
    return found, {**found, **{site: merge_histogram(model, histogram) for site, histogram in own.items()}}


def choose_scales(
    histograms: Mapping[Site, MagnitudeHistogram],
    ranges: RangeEstimator,
    lineage: Lineage,
    tokens: int,
    *,
    bits: int = 8,
    symmetric: bool = True,
) -> ActivationScales:
    """Return the static scales that a range estimator chooses from histograms.

    Args:
        histograms: result of :func:`observe_sites`.
        ranges: the range estimator.
        lineage: lineage of the histograms.
        tokens: number of text tokens in them.
        bits: bits of the codes.
        symmetric: False for zero points and ranges from the smallest to the largest value.

    Raises:
        UsageError: the estimator has no asymmetric form.
    """
    scales: dict[Site, float] = {}
    zero_points: dict[Site, int] = {}
    for site, histogram in histograms.items():
        if symmetric:
            scales[site] = symmetric_scale(ranges.threshold(histogram, bits), bits)
        else:
            scales[site], zero_points[site] = asymmetric_range(*ranges.signed_range(histogram), bits)
    return ActivationScales(scales, ranges.name, lineage, tokens, zero_points, bits)
