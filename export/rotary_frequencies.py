"""Inverse frequencies of rotary position embeddings, by scaling rule."""

from __future__ import annotations

import math

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.model_spec import RotaryScaling


def rotated_channels(rotary: RotaryScaling | None, head_dim: int) -> int:
    """Return how many channels of a head are rotated, the first ones; 0 without rotary positions."""
    return int(head_dim * rotary.partial) if rotary else 0


def inverse_frequencies(rotary: RotaryScaling, head_dim: int) -> FloatArray:
    """Return the angle per position of each channel pair in radians, float32 ``[rotated channels / 2]``.

    Rules:

    - ``default``: unscaled.
    - ``linear``: every frequency divided by ``factor``.
    - ``llama3``: the low frequencies divided by ``factor``, with a smooth transition between the wavelengths given by
      ``low_freq_factor`` and ``high_freq_factor`` (Llama 3.1).
    - ``yarn``: the same with a transition that is linear in the channel (Peng et al., 2023).
    - ``longrope``: each divided by a factor of its own (Ding et al., 2024). Only the short factors are used, those of
      contexts within the training length.
    """
    size = rotated_channels(rotary, head_dim)
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies: FloatArray = (1.0 / np.power(np.float32(rotary.theta), exponents)).astype(np.float32)
    if rotary.rule == "linear":
        return np.asarray(frequencies / np.float32(_number(rotary, "factor")), dtype=np.float32)
    if rotary.rule == "llama3":
        rotations = _number(rotary, "original_max_position_embeddings") * frequencies / (2 * math.pi)
        low, high = _number(rotary, "low_freq_factor"), _number(rotary, "high_freq_factor")
        smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        divided = frequencies / _number(rotary, "factor")
        return np.asarray((1 - smooth) * divided + smooth * frequencies, dtype=np.float32)
    if rotary.rule == "yarn":
        first, last = (_yarn_channel(rotary, size, key, usual) for key, usual in (("beta_fast", 32), ("beta_slow", 1)))
        if _number(rotary, "truncate", 1.0):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, size - 1)
        ramp = np.clip((np.arange(size // 2) - first) / (last - first or 0.001), 0.0, 1.0)
        return np.asarray(frequencies * (ramp / _number(rotary, "factor") + 1 - ramp), dtype=np.float32)
    if rotary.rule == "longrope":
        return np.asarray(frequencies / np.asarray(rotary.parameters["short_factor"], dtype=np.float32))
    return frequencies


def attention_factor(rotary: RotaryScaling) -> float:
    """Return the factor of cosines and sines, by which ``yarn`` and ``longrope`` sharpen attention in long contexts."""
    if "attention_factor" in rotary.parameters:
        return _number(rotary, "attention_factor")
    factor = _number(rotary, "factor", 1.0)
    if factor <= 1:
        return 1.0
    if rotary.rule == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(_number(rotary, "original_max_position_embeddings")))
    if rotary.rule == "yarn":
        above, below = _number(rotary, "mscale", 0.0), _number(rotary, "mscale_all_dim", 0.0)
        if above and below:
            return (0.1 * above * math.log(factor) + 1) / (0.1 * below * math.log(factor) + 1)
        return 0.1 * math.log(factor) + 1
    return 1.0


def _yarn_channel(rotary: RotaryScaling, size: int, key: str, usual: float) -> float:
    """Return the pair that completes ``key`` rotations over the training length."""
    rotations, trained = _number(rotary, key, usual), _number(rotary, "original_max_position_embeddings")
    return size * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(rotary.theta))


def _number(rotary: RotaryScaling, key: str, usual: float | None = None) -> float:
    value = rotary.parameters[key] if usual is None else rotary.parameters.get(key, usual)
    if isinstance(value, tuple):
        raise TypeError(f"rotary parameter {key} is a list")
    return float(value)
