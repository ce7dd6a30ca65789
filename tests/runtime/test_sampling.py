"""Sampling against closed forms and transformers' own processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.runtime.sampling import Sampler, SamplingParams, distribution

logits_arrays = hnp.arrays(np.float32, st.integers(2, 30), elements=st.floats(-20, 20, width=32))


@given(logits=logits_arrays, temperature=st.floats(0.05, 5))
def test_temperature_alone_is_softmax_of_the_quotient(logits: Any, temperature: float) -> None:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    np.testing.assert_allclose(
        distribution(logits, SamplingParams(temperature=temperature)), weights / weights.sum(), rtol=1e-9, atol=1e-300
    )


@given(logits=logits_arrays)
def test_default_is_the_first_of_the_largest(logits: Any) -> None:
    expected = min(i for i, v in enumerate(logits) if v == max(logits))
    assert Sampler(SamplingParams()).next(logits) == expected


@given(seed=st.integers(0, 2**32), data=st.data())
def test_all_filters_together_equal_transformers(seed: int, data: Any) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal(50).astype(np.float32) * 3
    history = rng.integers(0, 50, 12)
    params = SamplingParams(
        temperature=data.draw(st.sampled_from([0.3, 1.0, 1.7])),
        top_k=data.draw(st.sampled_from([0, 1, 7, 50, 80])),
        top_p=data.draw(st.sampled_from([0.05, 0.5, 0.93, 1.0])),
        min_p=data.draw(st.sampled_from([0.0, 0.02, 0.3])),
        repetition_penalty=data.draw(st.sampled_from([0.8, 1.0, 1.3])),
    )
    chain = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(params.repetition_penalty), TemperatureLogitsWarper(params.temperature)]
    )
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    scores = chain(torch.from_numpy(history)[None], torch.from_numpy(logits).double()[None])
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    np.testing.assert_allclose(distribution(logits, params, history.tolist()), expected, rtol=1e-6, atol=1e-12)


@given(
    probabilities=hnp.arrays(np.float64, st.integers(2, 40), elements=st.floats(0.01, 1)),
    top_p=st.floats(0.01, 0.99),
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(probabilities: Any, top_p: float) -> None:
    probabilities = probabilities / probabilities.sum()
    got = distribution(np.log(probabilities), SamplingParams(temperature=1, top_p=top_p))
    kept = got > 0
    assert probabilities[kept].sum() >= top_p - 1e-9
    assert probabilities[kept].sum() - probabilities[kept].min() < top_p + 1e-9
    assert kept.all() or probabilities[kept].min() >= probabilities[~kept].max() - 1e-12
    np.testing.assert_allclose(got[kept], probabilities[kept] / probabilities[kept].sum(), rtol=1e-9)


@given(logits=logits_arrays, min_p=st.floats(0.01, 1))
def test_min_p_keeps_what_is_within_a_factor_of_the_best(logits: Any, min_p: float) -> None:
    got = distribution(logits, SamplingParams(temperature=1, min_p=min_p))
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    clear = np.abs(ratio - min_p) > 1e-9
    np.testing.assert_array_equal((got > 0)[clear], (ratio >= min_p)[clear])


def test_top_k_keeps_ties() -> None:
    got = distribution(np.array([3.0, 1, 3, 3, 0], dtype=np.float32), SamplingParams(temperature=1, top_k=2))
    np.testing.assert_allclose(got, [1 / 3, 0, 1 / 3, 1 / 3, 0])


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.0, 0.7]), where=[True, True, False, True], out=np.full(4, -np.inf))
    sampler = Sampler(SamplingParams(temperature=1, seed=3))
    counts = np.bincount([sampler.next(logits) for _ in range(20_000)], minlength=4)
    assert counts[2] == 0
    # Four standard deviations of a binomial with n = 20,000.
    np.testing.assert_allclose(counts / 20_000, [0.1, 0.2, 0, 0.7], atol=4 * 0.5 / 20_000**0.5)


@given(seed=st.integers(0, 2**63))
def test_seed_decides_the_draws(seed: int) -> None:
    logits = np.zeros(1000, dtype=np.float32)
    params = SamplingParams(temperature=1, seed=seed)
    first, second = Sampler(params), Sampler(params)
    draws = [first.next(logits) for _ in range(8)]
    assert draws == [second.next(logits) for _ in range(8)]
    assert len(set(draws)) > 1


def test_without_seed_draws_differ() -> None:
    logits = np.zeros(100_000, dtype=np.float32)
    params = SamplingParams(temperature=1)
    assert [Sampler(params).next(logits) for _ in range(4)] != [Sampler(params).next(logits) for _ in range(4)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_never_become_a_token(bad: float, temperature: float) -> None:
    with pytest.raises(CheckFailed, match="1 of 3 logits"):
        Sampler(SamplingParams(temperature=temperature)).next(np.array([1, bad, 2], dtype=np.float32))


def test_all_forbidden_is_an_error() -> None:
    with pytest.raises(CheckFailed, match="every token is forbidden"):
        distribution(np.full(3, -np.inf, dtype=np.float32), SamplingParams())


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
def test_tiny_temperature_is_the_most_probable_token(temperature: float) -> None:
    got = distribution(np.array([3.0, 1, 5, -2], dtype=np.float32), SamplingParams(temperature=temperature))
    np.testing.assert_array_equal(got, [0, 0, 1, 0])


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0},
        {"top_p": 1.01},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("nan")},
        {"seed": -1},
    ],
)
def test_value_out_of_range_is_named(values: dict[str, Any]) -> None:
    (name,) = values
    with pytest.raises(UsageError, match=f"^{name} is ") as caught:
        SamplingParams(**values)
    assert name in caught.value.hint
