"""Measured quality: perplexity, divergence from the original model, and activation magnitudes."""

from __future__ import annotations

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
