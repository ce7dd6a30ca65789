"""The sections of a recipe: each setting with its type, default, range and description."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from cushion_deploy.core.dtypes import PlanDtype
from cushion_deploy.core.graph_form import MAX_OPSET, MIN_OPSET
from cushion_deploy.core.graphs import PrefixMode
from cushion_deploy.core.kv_scales import KvGranularity
from cushion_deploy.core.scales import Estimator
from cushion_deploy.errors import unknown_choice

Names = Annotated[tuple[str, ...], Field(strict=False)]
"""A tuple of strings; not strict, so that a YAML list is accepted for the tuple."""


class Section(BaseModel):
    """A group of settings. Every field has a description, from which the commented YAML and ``--help`` are made."""

    # Strict, because pydantic would otherwise accept the YAML `yes` as the number 1, and "4" as 4.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)


class Compute(Section):
    """Where and how torch computes."""

    device: str = Field(
        default="auto",
        description="Device that runs the model: auto (the GPU that is there), cpu, cuda, cuda:N or mps.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Floating-point type to compute in; auto is float32 on a CPU, and the checkpoint's type on a GPU.",
    )
    memory: float | None = Field(
        default=None,
        ge=0,
        description="GiB of weights that may stay on the device; layers beyond that are read from disk when they run. "
        "Null is 80 % of what is free.",
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]+)?", value):
            raise unknown_choice("device", value, ["auto", "cpu", "cuda", "cuda:N", "mps"])
        return value


class Search(Section):
    """How the prefix is found."""

    enabled: bool = Field(default=True, description="Search for a prefix; false builds without one.")
    ship: Literal["auto", "always"] = Field(
        default="auto",
        description="Ship the prefix if the quantized model is closer to the original with it than without it, each "
        "with the same remedies (auto), or whatever comes of it (always).",
    )
    seed_tokens: Names = Field(default=(), description="Tokens that the prefix begins with, as text.")
    max_length: int = Field(default=4, ge=0, description="Maximum number of tokens in the prefix.")
    tau: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="Append a token only if at most this fraction of the quantization error remains.",
    )
    text_tokens: int = Field(
        default=512, ge=16, description="Number of text tokens on which each step scores the candidates."
    )
    objective: Literal["error", "max"] = Field(
        default="error",
        description="What to minimize: the squared quantization error (error), or the largest activation (max).",
    )
    bits: Literal[8, 6, 4] = Field(
        default=8, description="Bits of the codes whose error is minimized; deployable models have 8."
    )
    mode: Literal["screen", "exhaustive"] = Field(
        default="screen",
        description="Score the candidates of a screen exactly (screen), or every token of the vocabulary (exhaustive).",
    )
    random_candidates: int = Field(
        default=128, ge=0, description="Candidates of a screened search that are drawn at random."
    )
    screen_tokens: int | None = Field(
        default=16384,
        ge=1,
        description="Random tokens that the self-sink screen runs of a larger vocabulary; null runs all of it.",
    )
    screen_candidates: int = Field(
        default=64,
        ge=0,
        description="Candidates of a screened search with the largest activation as their own attention sink.",
    )
    gradient_candidates: int = Field(
        default=64,
        ge=0,
        description="Candidates of a screened search that are ranked best by the gradient; 0 computes no gradient.",
    )
    audit_tokens: int = Field(
        default=16,
        ge=0,
        description="Random tokens, scored exactly, against which each token that the search finds is ranked.",
    )
    average_tokens: int = Field(
        default=512,
        ge=0,
        description="Replace the keys and values of the first token found by their mean over this many tokens of text, "
        "each as the first one, where that changes the unquantized model less; 0 keeps those of the token.",
    )
    average_chats: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Share of those tokens that is the beginning-of-sequence token, if every chat of the model begins "
        "with it: more is less visible to chats, and more visible to text, which decides whether the mean is kept.",
    )
    batch_positions: int = Field(default=2048, ge=1, description="Token positions per forward pass; bounds memory.")


ROTATIONS = ("rotate_down", "rotate_out", "rotate_in")
"""The settings of rotations in the section ``smoothing``."""


class SmoothQuant(Section):
    """How inputs of linears are made easier to quantize: SmoothQuant and rotations."""

    alpha: float | None = Field(
        default=0.5, ge=0, le=1, description="Migration strength of SmoothQuant; null disables it."
    )
    limit: float | None = Field(
        default=1.5,
        ge=0.01,
        description="Scale down channels that still exceed this multiple of the 90th percentile; null disables it.",
    )
    rotate_down: int = Field(
        default=512,
        ge=0,
        description="Rotate the input of each down projection in blocks (a Hadamard transform, undone in the weights): "
        "the largest power of two up to this that divides the width; 0 disables it.",
    )
    rotate_out: int = Field(
        default=16, ge=0, description="The same for the input of each output projection of the attention."
    )
    rotate_in: int = Field(
        default=16,
        ge=0,
        description="The same for what the attention and the MLP read: the input of the query, key and value "
        "projections, and of the gate and up projections.",
    )

    @property
    def rotates(self) -> bool:
        """Whether anything is rotated."""
        return any(getattr(self, name) for name in ROTATIONS)

    @property
    def enabled(self) -> bool:
        """Whether anything is smoothed or rotated."""
        return self.alpha is not None or self.rotates


class Tuning(Section):
    """How the prefix is tuned (Eq. 11 of the paper)."""

    enabled: bool = Field(
        default=False, description="Train the keys and values of the prefix while the model stays frozen."
    )
    loss: Literal["invisible", "distill", "ce"] = Field(
        default="invisible",
        description="Make the unquantized model behind the prefix predict what the original predicts (invisible), make "
        "the quantized model do so (distill), or predict the text as the paper does (ce).",
    )
    first_weight: float = Field(
        default=0.25,
        gt=0,
        le=1,
        description="Weight of the first 16 positions of a window in the loss invisible: the original model has its "
        "attention sink there, so no prefix is invisible to them.",
    )
    error_weight: float = Field(
        default=0.01,
        ge=0,
        description="Weight (lambda) of the quantization error in the loss. At 0 the loss invisible may give the sink "
        "back to the text.",
    )
    scales: bool = Field(
        default=True,
        description="Train the static activation scales together with the prefix; false keeps those of the untuned "
        "prefix. Not with the loss invisible: its smoothing and scales are measured behind the tuned prefix.",
    )
    learning_rate: float = Field(default=0.01, gt=0, le=100, description="Adam learning rate of the keys and values.")
    scale_learning_rate: float = Field(
        default=0.003, gt=0, le=100, description="Adam learning rate of the logarithms of the scales."
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="Learning rate schedule; the cosine begins with up to 10 steps of warm-up."
    )
    epochs: int = Field(default=75, ge=1, description="Number of passes over the training windows.")
    windows: int = Field(default=64, ge=1, description="Number of windows of text to train on.")
    held_out: int = Field(default=8, ge=1, description="Number of held-out windows that select the state to keep.")
    window: int = Field(default=256, ge=2, description="Tokens per window.")
    batch: int = Field(default=16, ge=1, description="Windows per optimizer step.")
    microbatch: int | None = Field(
        default=None,
        ge=1,
        description="Windows per forward and backward pass; bounds memory. Null is the whole batch on a GPU, or if "
        "layers are streamed, and 1 on a CPU.",
    )
    clip: float = Field(default=1.0, gt=0, description="Maximum gradient norm.")
    judge_every: int = Field(default=20, ge=1, description="Steps between evaluations on the held-out windows.")
    checkpointing: bool = Field(
        default=True,
        description="Recompute activations in the backward pass instead of keeping them (gradient checkpointing).",
    )

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized while it is tuned."""
        return self.loss != "invisible"

    @property
    def trains_scales(self) -> bool:
        """Whether the static scales are trained too."""
        return self.quantized and self.scales


class Calibration(Section):
    """How static activation scales are measured."""

    data: str | None = Field(
        default=None, description="Text file or dataset to calibrate on; null is the default, which works offline."
    )
    estimator: Estimator = Field(default="percentile", description="Range estimator: max, percentile or mse.")
    percentile: float = Field(default=99.9995, ge=90, le=100, description="Percentile of the percentile estimator.")
    windows: int = Field(default=32, ge=1, description="Number of windows of text to observe.")
    window: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per window; null is 512, and in a model with sliding windows 512 beyond them, in fewer "
        "windows with as many tokens.",
    )


class Export(Section):
    """What the ONNX graph looks like."""

    quantize_head: bool = Field(default=False, description="Quantize the output head (lm_head) to INT8 as well.")
    embedding: Literal["auto", "int8", "float"] = Field(
        default="auto",
        description="Store the token embedding, and with it a tied head, as INT8 codes with one scale per 32 values "
        "(int8), in floating point (float), or as codes if they lose nothing, as those of a Q8_0 table (auto).",
    )
    keep_float: Names = Field(
        default=(),
        description="Sites to keep in floating point, by name, or auto:N for the N most sensitive ones.",
    )
    opset: int | None = Field(
        default=None,
        ge=MIN_OPSET,
        le=MAX_OPSET,
        description="ONNX opset; null is the lowest one with every operator of the graph.",
    )
    prefix: PrefixMode = Field(
        default="baked",
        description="Store the prefix in the graph (baked), in a file that initializes every cache (cache), or "
        "nowhere (none).",
    )
    kv_cache: Literal["float", "int8"] = Field(
        default="float",
        description="Store the keys and values of the cache in floating point (float) or as INT8 codes (int8).",
    )
    kv_scales: KvGranularity = Field(
        default="per-head",
        description="Granularity of the scales of an INT8 cache: per head, or per tensor (one in each layer).",
    )


class Evaluation(Section):
    """What perplexity is measured on."""

    data: str | None = Field(
        default=None, description="Text file or dataset, other than the calibration data; null is the default."
    )
    window: int | None = Field(
        default=None,
        ge=2,
        description="Tokens per window; null is 2048 for wikitext, 512 for other text and at least 512 beyond sliding "
        "windows, or what the model has room for.",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        description="Number of tokens to read from the start of the text; null is all of wikitext, 4096 of other text.",
    )

    @model_validator(mode="after")
    def _one_window(self) -> Evaluation:
        if self.max_tokens is not None and self.window is not None and self.max_tokens < self.window:
            raise ValueError(f"max_tokens {self.max_tokens} is less than one window of {self.window} tokens")
        return self


class Parity(Section):
    """How much text the parity ladder compares its rungs on."""

    data: str | None = Field(default=None, description="Text file or dataset; null is the default.")
    tokens: int = Field(default=256, ge=2, description="Number of text tokens on which logits and codes are compared.")
    decode_tokens: int = Field(
        default=16, ge=1, description="Number of tokens whose one-by-one decoding is compared with prefill."
    )


class TensorRt(Section):
    """Floating-point type and optimization profiles of TensorRT plans."""

    dtype: PlanDtype = Field(
        default="auto",
        description="Floating-point type of plans: float16, bfloat16 (for residual streams beyond the range of "
        "float16), float32 (without fused attention), or float16 where the values measured on the calibration text "
        "fit and bfloat16 otherwise (auto).",
    )
    max_batch: int = Field(default=1, ge=1, description="Maximum batch size of the optimization profiles.")
    max_context: int = Field(
        default=2048, ge=1, description="Maximum context length of the optimization profiles, without the prefix."
    )
    max_prefill: int = Field(default=512, ge=1, description="Maximum number of prompt tokens per call of a plan.")
