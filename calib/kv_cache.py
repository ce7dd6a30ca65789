"""Observe the keys and values that enter the cache on text behind the prefix, and choose the scales of INT8 codes."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.calib.estimators import BINS, MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import qmax, symmetric_scale
from cushion_deploy.core.kv_scales import KV_PARTS, KvGranularity, KvPart, KvScales, kv_site
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.kv_cache import watched_cache
from cushion_deploy.modeling.runner import TorchRunner

TINY = float(np.finfo(np.float32).tiny)
QMAX = qmax(8)
Histograms = dict[tuple[int, KvPart], list[MagnitudeHistogram]]
"""Layer and part to the histogram of each head, or of all heads together."""


@dataclass
class CacheObserver:
    """Histograms of the magnitudes that enter the cache, text tokens only."""

    granularity: KvGranularity
    mask: Tensor
    batch: int = 0
    histograms: Histograms = field(default_factory=dict)

    def __call__(self, layer: int, part: KvPart, states: Tensor) -> Tensor:
        """Take one batch ``[batch, kv_heads, length, head_dim]`` and return it as it is.

        Raises:
            UsageError: NaN or infinity, naming layer, part, head and batch.
        """
        heads = states.transpose(1, 2)[self.mask].abs().transpose(0, 1)  # [kv_heads, tokens, head_dim]
        groups = [heads] if self.granularity == "per-tensor" else list(heads)
        found = self.histograms.setdefault((layer, part), [MagnitudeHistogram() for _ in groups])
        for head, (histogram, magnitudes) in enumerate(zip(found, groups, strict=True)):
            amax = float(magnitudes.max())
            if not np.isfinite(amax):
                raise UsageError(
                    f"{kv_site(layer, part)}, head {head}, calibration batch {self.batch}: "
                    "NaN or infinity enters the cache",
                    hint="the model overflows on this text; check the checkpoint, or calibrate on other text",
                )
            if amax < TINY:
                continue  # a dead head: models have some, and their zeros are codes on any scale
            histogram.cover(amax)
            counts = torch.histc(magnitudes, bins=BINS, min=0.0, max=histogram.limit)
            histogram.add(counts.numpy().astype(np.int64))
        return states


@torch.inference_mode()
def observe_cache(
    model: TorchRunner,
    prefix: Prefix,
    ids: IntArray,
    mask: IntArray,
    granularity: KvGranularity,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Histograms:
    """Return the histograms of keys and values of every layer.

    Args:
        model: the model.
        prefix: stands before every window and is never observed itself.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        granularity: whether heads are kept apart.
        batch_size: windows a forward pass.
        progress: where to report windows done.
    """
    past = prefix_tensors(prefix)
    observer = CacheObserver(granularity, torch.zeros(0, dtype=torch.bool))
    with watched_cache(model, observer):
        for start in range(0, len(ids), batch_size):
            rows = torch.from_numpy(mask[start : start + batch_size])
            observer.mask, observer.batch = rows.bool(), start // batch_size
            full = None if bool(rows.all()) else rows
            model.run(torch.from_numpy(ids[start : start + batch_size]), past, full, head=False)
            progress("observing keys and values", min(start + batch_size, len(ids)), len(ids))
    return observer.histograms


def choose_kv_scales(
    histograms: Histograms,
    ranges: RangeEstimator,
    granularity: KvGranularity,
    prefix: Prefix,
    lineage: Lineage,
    tokens: int,
    *,
    with_prefix: bool,
) -> KvScales:
    """Return the scales of an INT8 cache that a range estimator reads off histograms.

    Args:
        histograms: of :func:`observe_cache`.
        ranges: how a range is chosen.
        granularity: what :func:`observe_cache` was given.
        prefix: what the histograms were observed behind.
        lineage: what they were observed under.
        tokens: text tokens that they count.
        with_prefix: the prefix lies in the cache: no range is smaller than the prefix's own. A clipped key of an
            attention sink would draw less attention at every step.
    """
    layers, heads = prefix.keys.shape[:2]

    def scales(part: KvPart) -> FloatArray:
        own = prefix.keys if part == "key" else prefix.values
        found = np.empty((layers, heads), dtype=np.float32)
        for layer in range(layers):
            amax = np.array([ranges.threshold(h) if h.amax else 0.0 for h in histograms[layer, part]])
            if with_prefix and prefix.length:
                per_head = np.abs(own[layer]).max(axis=(1, 2))
                amax = np.maximum(amax, per_head.max() if granularity == "per-tensor" else per_head)
            steps = [symmetric_scale(value) for value in _alive(amax)]
            found[layer] = steps * (heads // len(steps))
        return found

    keys, values = (scales(part) for part in KV_PARTS)
    in_cache = with_prefix and prefix.length > 0
    return KvScales(keys, values, granularity, ranges.name, lineage, tokens, in_cache)


def _alive(ranges: FloatArray) -> FloatArray:
    """Return the ranges of a layer's heads; a head without any takes the largest, which fits whatever it may carry."""
    largest = float(ranges.max())
    return np.where(ranges < QMAX * TINY, largest if largest >= QMAX * TINY else float(QMAX), ranges)
