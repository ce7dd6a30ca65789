"""Inverse frequencies are those of transformers, for every rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from cushion_deploy.core.model_spec import RotaryScaling
from cushion_deploy.export.rotary_frequencies import attention_factor, inverse_frequencies


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


@settings(deadline=None, derandomize=True)
@given(
    half=st.integers(2, 64),
    theta=st.floats(100.0, 1e6),
    factor=st.floats(1.0, 40.0),
    original=st.sampled_from([256, 4096, 32768]),
    truncate=st.booleans(),
    beta=st.sampled_from([None, (32.0, 1.0), (16.0, 2.0)]),
    mscale=st.sampled_from([None, (1.0, 0.7), (0.8, 1.0)]),
    gain=st.sampled_from([None, 1.3]),
)
def test_yarn_is_that_of_transformers(
    half: int, theta: float, factor: float, original: int, truncate: bool, beta: Any, mscale: Any, gain: Any
) -> None:
    parameters: dict[str, Any] = {"factor": factor, "original_max_position_embeddings": original, "truncate": truncate}
    parameters |= dict(zip(("beta_fast", "beta_slow"), beta, strict=True)) if beta else {}
    parameters |= dict(zip(("mscale", "mscale_all_dim"), mscale, strict=True)) if mscale else {}
    parameters |= {"attention_factor": gain} if gain else {}
    rope = {"rope_type": "yarn", "rope_theta": theta, **parameters}
    config = LlamaConfig(
        hidden_size=4 * half,
        num_attention_heads=2,
        max_position_embeddings=int(original * factor),
        rope_parameters=rope,
    )
    oracle = LlamaRotaryEmbedding(config)
    scaling = RotaryScaling(theta, "yarn", {key: float(value) for key, value in parameters.items()})
    np.testing.assert_allclose(inverse_frequencies(scaling, 2 * half), oracle.inv_freq.numpy(), rtol=1e-4)
    assert attention_factor(scaling) == pytest.approx(oracle.attention_scaling)


@pytest.mark.parametrize("gain", [None, 1.25])
@pytest.mark.parametrize("partial", [1.0, 0.75])
def test_longrope_is_that_of_transformers_within_the_trained_context(gain: float | None, partial: float) -> None:
    head, channels = 16, int(16 * partial)
    factors = {"short_factor": [1 + 0.1 * i for i in range(channels // 2)], "long_factor": [4.0] * (channels // 2)}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": partial, **factors}
    rope |= {"original_max_position_embeddings": 64} | ({"attention_factor": gain} if gain else {})
    config = Phi3Config(
        hidden_size=2 * head,
        num_attention_heads=2,
        max_position_embeddings=512,
        original_max_position_embeddings=64,
        rope_parameters=rope,
        pad_token_id=0,
    )
    oracle = Phi3RotaryEmbedding(config)
    given = {key: tuple(value) for key, value in factors.items()}
    given |= {"factor": 8.0, "original_max_position_embeddings": 64.0} | ({"attention_factor": gain} if gain else {})
    scaling = RotaryScaling(10000.0, "longrope", given, partial)
    np.testing.assert_allclose(inverse_frequencies(scaling, head), oracle.inv_freq.numpy(), rtol=1e-5)
    assert attention_factor(scaling) == pytest.approx(oracle.attention_scaling)
