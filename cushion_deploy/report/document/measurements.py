"""What a build measured: perplexity, divergence and activation magnitudes, scales and cache."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cushion_deploy.report.document.base import Count, NonNegativeFloat, PositiveFloat, StrictModel

LATER_WINDOW = 18
"""Tokens of the shortest window with a prediction from position 16 on."""


class Columns(StrictModel):
    """One value for each of the four columns; null if it is not finite or was not measured."""

    fp: NonNegativeFloat | None
    fp_prefix: NonNegativeFloat | None
    quantized: NonNegativeFloat | None
    quantized_prefix: NonNegativeFloat | None


class Perplexity(StrictModel):
    """Perplexity on text that calibration did not use; null if it was not measured or is not finite.

    Attributes:
        window: tokens per non-overlapping window.
        tokens: total number of scored tokens.
        text_tokens: number of tokens of the whole text; null if an earlier version wrote the report.
        fp, fp_prefix, quantized, quantized_prefix: the four columns, with simulated quantization.
        stderr: standard error of each perplexity; like every standard error here, it treats tokens as independent.
        engine: the compiled engine, with the prefix if there is one.
        engine_stderr: the standard error of its perplexity.
        divergence: mean KL divergence of each column from the original model in nats per token, on the same text.
        divergence_stderr: its standard error.
        kl_after_16: the same mean without the predictions that are made at the positions 0 to 15 of a window, where
            the original model has its attention sink; tokens of a prefix have no position. Null if the windows are
            shorter than 18 tokens.
        kl_after_16_stderr: its standard error.
    """

    corpus: str
    window: Count
    tokens: Count
    text_tokens: Count | None = None
    fp: PositiveFloat | None
    fp_prefix: PositiveFloat | None
    quantized: PositiveFloat | None
    quantized_prefix: PositiveFloat | None
    stderr: Columns | None = None
    engine: PositiveFloat | None = None
    engine_stderr: NonNegativeFloat | None = None
    divergence: Columns | None = None
    divergence_stderr: Columns | None = None
    kl_after_16: Columns | None = None
    kl_after_16_stderr: Columns | None = None


class Chat(StrictModel):
    """Divergence from the original model in chats.

    Attributes:
        prompts, tokens: number and length of the prompts: a user's message in the model's chat template.
        answer_tokens: tokens of each answer, the most probable ones of the original model.
        answer: divergence, as in ``perplexity``, of the predictions of the answers' tokens. The original model has the
            beginning-of-sequence token of its template before the prompt, a model with a prefix has the prefix instead.
        prompt: the same of the predictions within the prompts, which nobody reads.
        answer_stderr, prompt_stderr: standard errors of the mean over prompts.
        missing: why there is no divergence; empty if there is.
    """

    prompts: Count
    tokens: Count
    answer_tokens: Count = 0
    answer: Columns | None = None
    answer_stderr: Columns | None = None
    prompt: Columns | None = None
    prompt_stderr: Columns | None = None
    missing: str = ""


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
        rotations: block size of the rotated inputs of each kind of Site.
        window: tokens in each window of text; null in reports of earlier versions.
        sliding_window: the smallest window of the model's layers; null if they have none.
    """

    estimator: str
    corpus: str
    tokens: Count
    sites: tuple[SiteScale, ...]
    smoothing_alpha: float | None = None
    rotations: dict[str, Count] = Field(default_factory=dict)
    window: Count | None = None
    sliding_window: Count | None = None


class KvCache(StrictModel):
    """An INT8 key/value cache; the last column of the perplexity table is measured with it.

    Attributes:
        scales: granularity of the scales.
        with_prefix: whether the prefix is stored in the cache and quantized as well.
        bytes_a_token, float32_bytes_a_token: size of the keys and values of all layers for one token.
        float_perplexity, float_divergence, float_kl_after_16: the same quantized model with a floating-point cache, on
            the same text; each with its standard error.
    """

    scales: Literal["per-head", "per-tensor"]
    with_prefix: bool
    bytes_a_token: Count
    float32_bytes_a_token: Count
    float_perplexity: PositiveFloat | None
    float_stderr: NonNegativeFloat | None = None
    float_divergence: NonNegativeFloat | None = None
    float_divergence_stderr: NonNegativeFloat | None = None
    float_kl_after_16: NonNegativeFloat | None = None
    float_kl_after_16_stderr: NonNegativeFloat | None = None
