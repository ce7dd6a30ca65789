"""What torch computes of the parity text, with which the rungs of the ladder compare graphs and engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.parity.limits import NOISE
from cushion_deploy.parity.segments import SiteCodes


@dataclass(frozen=True)
class TorchReference:
    """Results of torch on the parity text, behind the prefix.

    Attributes:
        ids: int64 ``[1, n]``.
        float_logits: ``[1, n, vocab]`` of the floating-point model.
        quantized_logits: ``[1, n, vocab]`` of the fake-quantized model.
        codes: int8 codes that enter each Site of the fake-quantized model.
        windows: int64 ``[count, window]`` for perplexity.
        quantized_nll: token losses of the fake-quantized model on ``windows``, ``[count, window - 1]``.
        prompt: int64 ``[1, m]``.
        greedy: greedy continuation of ``prompt`` by the fake-quantized model.
        noise: largest difference of the floating-point model's logits from those of float64 arithmetic.
    """

    ids: IntArray
    float_logits: FloatArray
    quantized_logits: FloatArray
    codes: SiteCodes
    windows: IntArray
    quantized_nll: FloatArray
    prompt: IntArray
    greedy: tuple[int, ...]
    noise: float

    @property
    def logits_within(self) -> float:
        """The largest difference of float32 logits between two faithful graphs."""
        return NOISE * self.noise

    @property
    def noise_words(self) -> str:
        """The noise as text, for the notes of the checks that it limits."""
        return f"limit: {NOISE} times the rounding noise of the model, {self.noise:.2g}"

    @property
    def ties(self) -> float:
        """The share of positions whose two largest float logits are so close that noise decides which is larger."""
        top = np.partition(self.float_logits, -2, axis=-1)[..., -2:]
        return float((top[..., 1] - top[..., 0] <= 2 * self.logits_within).mean())
