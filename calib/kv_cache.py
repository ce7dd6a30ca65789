"""Observe the keys and values of text behind the prefix and choose the scales of an INT8 cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.calib.calibrate import count_magnitudes, merge_histogram
from cushion_deploy.calib.estimators import MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.fakequant import qmax, symmetric_scale
from cushion_deploy.core.kv_scales import KV_PARTS, KvGranularity, KvPart, KvScales, kv_site
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.observe_cache import watched_cache
from cushion_deploy.modeling.runner import TorchRunner

TINY = float(np.finfo(np.float32).tiny)
NOISE = 2.0**-20
"""Rounding noise of a float32 sum of a few thousand products, over the largest of them."""
QMAX = qmax(8)
Histograms = dict[tuple[int, KvPart], list[MagnitudeHistogram]]
"""Layer and part to one histogram per head, or a single one for all heads."""


@dataclass
class CacheObserver:
    """Histograms of the magnitudes that enter the cache, over text tokens only.

    Attributes:
        granularity: one histogram per head, or one for all heads of a layer.
        mask: bool ``[batch, length]`` of the current batch, False on padding; None if nothing is padded.
        batch: number of the current batch, for error messages.
        histograms: the histograms so far.
    """

    granularity: KvGranularity
    mask: Tensor | None = None
    batch: int = 0
    histograms: Histograms = field(default_factory=dict)

    def __call__(self, layer: int, part: KvPart, states: Tensor) -> Tensor:
        """Add one batch ``[batch, kv_heads, length, head_dim]`` and return it unchanged.

        Raises:
            UsageError: the batch has NaN or infinity.
        """
        tokens = states.transpose(1, 2)  # [batch, length, kv_heads, head_dim]
        tokens = tokens.flatten(0, 1) if self.mask is None else tokens[self.mask]
        heads = tokens.float().abs().transpose(0, 1)  # [kv_heads, tokens, head_dim]
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
                continue  # a dead head, as some models have: zeros fit any scale
            histogram.cover(amax)
            histogram.add(count_magnitudes(magnitudes.flatten(), histogram.limit))
        return states

    def begin(self, batch: int, mask: Tensor | None) -> None:
        """Describe the batch that comes next; ``mask`` int64 ``[batch, length]`` is 0 on padding."""
        self.batch, self.mask = batch, None if mask is None else mask.bool()


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
        prefix: precedes every window and is not observed.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        granularity: one histogram per head, or one for all heads of a layer.
        batch_size: windows per forward pass.
        progress: where to report the number of windows done.
    """
    batches, observer = model.batches(ids, mask, batch_size), CacheObserver(granularity)
    with watched_cache(model, observer):
        model.sweep(
            batches,
            model.past(prefix),
            before=lambda number: observer.begin(number, batches[number].mask),
            progress=progress,
            task="observing keys and values",
        )
    count = 1 if granularity == "per-tensor" else model.spec.num_kv_heads
    return {
        (layer, part): [
            merge_histogram(model, histogram)
            for histogram in observer.histograms.get((layer, part), [MagnitudeHistogram() for _ in range(count)])
        ]
        for layer in range(model.spec.num_layers)
        for part in KV_PARTS
    }


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
    """Return the scales of an INT8 cache that a range estimator chooses from histograms.

    Args:
        histograms: result of :func:`observe_cache`.
        ranges: the range estimator.
        granularity: the granularity given to :func:`observe_cache`.
        prefix: the prefix given to it.
        lineage: lineage of the histograms.
        tokens: number of text tokens in them.
        with_prefix: True if the prefix is in the cache: ranges then include it, because a clipped key of an attention
            sink would receive less attention in every step.
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
            steps = [symmetric_scale(value) for value in _without_zeros(amax)]
            found[layer] = steps * (heads // len(steps))
        return found

    keys, values = (scales(part) for part in KV_PARTS)
    in_cache = with_prefix and prefix.length > 0
    return KvScales(keys, values, granularity, ranges.name, lineage, tokens, in_cache)


def _without_zeros(ranges: FloatArray) -> FloatArray:
    """Return the ranges of a layer's heads, with the largest of them for dead heads.

    A head is dead if it has nothing but zeros, or nothing but what rounding leaves of zeros beside the other heads:
    scales for such noise would make codes of it, and every engine rounds in its own way.
    """
    largest = float(ranges.max())
    if largest < QMAX * TINY:
        return np.full_like(ranges, QMAX)
    return np.where(ranges < max(QMAX * TINY, NOISE * largest), largest, ranges)
