"""Observe every Site on text behind the prefix and choose its static per-tensor scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.calib.estimators import BINS, MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import asymmetric_range, symmetric_scale
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner


@dataclass
class SiteObserver:
    """Histogram and signed range of the input of each Site, over text tokens only.

    Attributes:
        mask: bool ``[batch, length]`` of the current batch, False on padding.
        batch: number of the current batch, for error messages.
        histograms: the histogram of each Site so far.
    """

    mask: Tensor
    batch: int = 0
    histograms: dict[Site, MagnitudeHistogram] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one batch ``[batch, length, features]``; padding is removed first.

        Raises:
            UsageError: the batch has NaN or infinity, or only zeros and subnormal numbers.
        """
        signed = x[self.mask].flatten()
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
        counts = torch.histc(signed.abs(), bins=BINS, min=0.0, max=histogram.limit)
        histogram.add(TorchRunner.array(counts).astype(np.int64))


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
    past = model.past(prefix)
    rows = model.tensor(mask)
    observer = SiteObserver(rows[:0].bool())
    with observed(model, observer):
        for start in range(0, len(ids), batch_size):
            part = rows[start : start + batch_size]
            observer.mask, observer.batch = part.bool(), start // batch_size
            model.run(model.tensor(ids[start : start + batch_size]), past, None if bool(part.all()) else part)
            progress("observing Sites", min(start + batch_size, len(ids)), len(ids))
    return observer.histograms


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
