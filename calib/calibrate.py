"""Observe every Site on text behind the prefix, and choose its static per-tensor scale."""

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
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.observe import observed


@dataclass
class SiteObserver:
    """Histograms of the magnitudes that enter each Site, and their signed range, text tokens only."""

    mask: Tensor
    batch: int = 0
    histograms: dict[Site, MagnitudeHistogram] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Take one batch ``[batch, length, features]``; padding is masked before anything is looked at.

        Raises:
            UsageError: NaN, infinity, or nothing but zeros or subnormal numbers, naming Site and batch.
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
        histogram.add(counts.numpy().astype(np.int64))


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
        prefix: stands before every window and is never observed itself.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        batch_size: windows a forward pass.
        progress: where to report windows done.
    """
    past = prefix_tensors(prefix)
    observer = SiteObserver(torch.zeros(0, dtype=torch.bool))
    with observed(model, observer):
        for start in range(0, len(ids), batch_size):
            rows = torch.from_numpy(mask[start : start + batch_size])
            observer.mask, observer.batch = rows.bool(), start // batch_size
            full = None if bool(rows.all()) else rows
            model.run(torch.from_numpy(ids[start : start + batch_size]), past, full)
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
    """Return the static scales that a range estimator reads off histograms.

    Args:
        histograms: of :func:`observe_sites`.
        ranges: how a range is chosen.
        lineage: what the histograms were observed under.
        tokens: text tokens that they count.
        bits: of the codes.
        symmetric: False adds zero points, and takes the range from the least to the largest value.

    Raises:
        UsageError: an estimator without asymmetric form.
    """
    scales: dict[Site, float] = {}
    zero_points: dict[Site, int] = {}
    for site, histogram in histograms.items():
        if symmetric:
            scales[site] = symmetric_scale(ranges.threshold(histogram, bits), bits)
        else:
            scales[site], zero_points[site] = asymmetric_range(*ranges.signed_range(histogram), bits)
    return ActivationScales(scales, ranges.name, lineage, tokens, zero_points, bits)
