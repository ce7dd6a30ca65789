"""Inverse frequencies are those of transformers, for every rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cushion_deploy.export.rotary import inverse_frequencies
from cushion_deploy.types import RotaryScaling


def expected(head_dim: int, rule: str, theta: float, parameters: dict[str, float]) -> np.ndarray:
    rope: dict[str, Any] = {"rope_type": rule, "rope_theta": theta, **parameters}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    config = LlamaConfig(
        hidden_size=2 * head_dim, num_attention_heads=2, max_position_embeddings=1 << 17, rope_parameters=rope
    )
    return np.asarray(LlamaRotaryEmbedding(config).inv_freq.numpy())


@settings(deadline=None, derandomize=True)
@given(
    half=st.integers(1, 64),
    theta=st.floats(10.0, 1e6),
    rule=st.sampled_from(["default", "linear", "llama3"]),
    factor=st.floats(1.0, 32.0),
    low=st.floats(0.5, 2.0),
    extra=st.floats(0.5, 4.0),
    original=st.sampled_from([64, 1024, 8192]),
)
def test_frequencies_are_those_of_transformers(
    half: int, theta: float, rule: str, factor: float, low: float, extra: float, original: int
) -> None:
    parameters: dict[str, float] = {}
    if rule != "default":
        parameters["factor"] = factor
    if rule == "llama3":
        parameters |= {
            "low_freq_factor": low,
            "high_freq_factor": low + extra,
            "original_max_position_embeddings": float(original),
        }
    found = inverse_frequencies(RotaryScaling(theta, rule, parameters), 2 * half)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(2 * half, rule, theta, parameters), rtol=2e-5)


def test_default_is_the_closed_form() -> None:
    found = inverse_frequencies(RotaryScaling(10000.0), 8)
    np.testing.assert_allclose(found, [1.0, 0.1, 0.01, 0.001], rtol=1e-6)


@pytest.mark.parametrize(("wavelength", "divisor"), [(10.0, 1.0), (1000.0, 8.0)])
def test_llama3_keeps_the_fast_and_divides_the_slow(wavelength: float, divisor: float) -> None:
    theta = (wavelength / (2 * math.pi)) ** 2  # the second of two pairs has frequency theta^(-1/2)
    scaling = RotaryScaling(
        theta,
        "llama3",
        {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64.0,
        },
    )
    found = inverse_frequencies(scaling, 4)[1]
    assert found == pytest.approx(2 * math.pi / wavelength / divisor, rel=1e-5)
