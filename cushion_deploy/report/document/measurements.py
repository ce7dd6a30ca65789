"""What a build measured: perplexity, divergence and activation magnitudes, scales and cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cushion_deploy.report.document.base import Count, NonNegativeFloat, PositiveFloat, StrictModel


class Divergence(StrictModel):
    """Mean KL divergence from the original model in nats per token, one value per column; null if not finite."""

    fp: NonNegativeFloat | None
    fp_prefix: NonNegativeFloat | None
    quantized: NonNegativeFloat | None
    quantized_prefix: NonNegativeFloat | None


class Perplexity(StrictModel):
    """Perplexity on text that calibration did not use; null if it was not measured or is not finite.

    Attributes:
        window: tokens per non-overlapping window.
        tokens: total number of scored tokens.
        fp, fp_prefix, quantized, quantized_prefix: the four columns, with simulated quantization.
        engine: the compiled engine, with the prefix if there is one.
        divergence: distance of each column from the original model, on the same text.
    """

    corpus: str
    window: Count
    tokens: Count
    fp: PositiveFloat | None
    fp_prefix: PositiveFloat | None
    quantized: PositiveFloat | None
    quantized_prefix: PositiveFloat | None
    engine: PositiveFloat | None = None
    divergence: Divergence | None = None


class LayerMagnitude(StrictModel):
    """The three largest activation magnitudes and the median magnitude of one layer's output."""

    layer: Count
    top1: NonNegativeFloat
    top2: NonNegativeFloat
    top3: NonNegativeFloat
    median: NonNegativeFloat


class Magnitudes(StrictModel):
    """Activation magnitudes per layer, without and with the prefix."""

    without: tuple[LayerMagnitude, ...]
    with_prefix: tuple[LayerMagnitude, ...] = Field(validation_alias="with", serialization_alias="with")


class SiteScale(StrictModel):
    """The static scale of one Site, and the largest magnitude observed there."""

    site: str
    scale: PositiveFloat
    amax: NonNegativeFloat


class Calibration(StrictModel):
    """The activation scales and how they were estimated.

    Attributes:
        smoothing_alpha: null without SmoothQuant.
        window: tokens in each window of text; null in reports of earlier versions.
        sliding_window: the smallest window of the model's layers; null if they have none.
    """

    estimator: str
    corpus: str
    tokens: Count
    sites: tuple[SiteScale, ...]
    smoothing_alpha: float | None = None
    window: Count | None = None
    sliding_window: Count | None = None


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
