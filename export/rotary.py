"""Inverse frequencies of rotary positions, by scaling rule."""

from __future__ import annotations

import math

import numpy as np

from cushion_deploy.types import FloatArray, RotaryScaling


def inverse_frequencies(rotary: RotaryScaling, head_dim: int) -> FloatArray:
    """Return the angle per position of each pair, float32 ``[head_dim / 2]``.

    Rules: ``default``; ``linear`` divides every frequency by ``factor``; ``llama3`` divides the slow ones only,
    with a smooth passage between the wavelengths given by ``low_freq_factor`` and ``high_freq_factor`` (Llama 3.1).
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies: FloatArray = (1.0 / np.power(np.float32(rotary.theta), exponents)).astype(np.float32)
    p = rotary.parameters
    if rotary.rule == "linear":
        return np.asarray(frequencies / np.float32(p["factor"]), dtype=np.float32)
    if rotary.rule == "llama3":
        rotations = p["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        smooth = np.clip((rotations - low) / (high - low), 0.0, 1.0)
        return np.asarray((1 - smooth) * frequencies / p["factor"] + smooth * frequencies, dtype=np.float32)
    return frequencies
