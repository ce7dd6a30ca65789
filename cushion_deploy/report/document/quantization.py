"""How activations and the key/value cache are quantized."""

from __future__ import annotations

from typing import Literal

from cushion_deploy.report.document.base import Count, NonNegativeFloat, PositiveFloat, StrictModel


class SiteScale(StrictModel):
    """The static scale of one Site, and the largest magnitude observed there."""

    site: str
    scale: PositiveFloat
    amax: NonNegativeFloat


class Calibration(StrictModel):
    """The activation scales and how they were estimated; ``smoothing_alpha`` is null without SmoothQuant."""

    estimator: str
    corpus: str
    tokens: Count
    sites: tuple[SiteScale, ...]
    smoothing_alpha: float | None = None


class KvCache(StrictModel):
    """An INT8 key/value cache; the last column of the perplexity table is measured with it.

    Attributes:
        scales: granularity of the scales.
        with_prefix: whether the prefix is stored in the cache and quantized as well.
        bytes_a_token, float32_bytes_a_token: size of the keys and values of all layers for one token.
        float_perplexity, float_divergence: the same quantized model with a floating-point cache, on the same text.
    """

    scales: Literal["per-head", "per-tensor"]
    with_prefix: bool
    bytes_a_token: Count
    float32_bytes_a_token: Count
    float_perplexity: PositiveFloat | None
    float_divergence: NonNegativeFloat | None = None
