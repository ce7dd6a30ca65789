"""Text drawn from the model: reproducible, and really from its own distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.modeling import sample
from cushion_deploy.modeling.runner import TorchRunner


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "SAMPLES", 4)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 12)


def test_a_seed_decides_the_text_and_the_global_generator_does_not(tiny_model: TorchRunner) -> None:
    first = sample.sample_text(tiny_model, 3)
    torch.manual_seed(99)
    assert sample.sample_text(tiny_model, 3) == first
    assert sample.sample_text(tiny_model, 4) != first


def test_progress_ends_with_all_tokens(tiny_model: TorchRunner) -> None:
    reports: list[tuple[int, int]] = []
    sample.sample_text(tiny_model, 0, lambda _, done, total: reports.append((done, total)))
    assert reports[-1] == (12, 12)


def test_tokens_follow_the_models_own_distribution(tiny_model: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 2048 first tokens, each is followed by a draw from softmax(logits): the mean log likelihood of the
    # draws is minus the mean entropy.
    monkeypatch.setattr(sample, "SAMPLES", 2048)
    monkeypatch.setattr(sample, "SAMPLE_TOKENS", 2)
    drawn: list[torch.Tensor] = []
    decode = tiny_model.tokenizer.batch_decode
    monkeypatch.setattr(tiny_model.tokenizer, "batch_decode", lambda ids, **k: drawn.append(ids) or decode(ids, **k))
    sample.sample_text(tiny_model, 0)
    ids = drawn[0].numpy()
    assert ids.shape == (2048, 2)
    assert len(np.unique(ids[:, 0])) > 300, "the first token is uniform over the vocabulary of 320"
    with torch.inference_mode():
        scores = torch.log_softmax(tiny_model.module(input_ids=torch.arange(320)[:, None]).logits[:, 0], dim=-1).numpy()
    entropy = -(np.exp(scores) * scores).sum(axis=1)
    likelihood = scores[ids[:, 0], ids[:, 1]]
    assert likelihood.mean() == pytest.approx(-entropy[ids[:, 0]].mean(), abs=0.1)


def test_draws_invert_the_cumulative_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(400, 50, generator=generator)
    uniform = torch.rand(400, generator=generator, dtype=torch.float64)
    weights = np.exp(logits.double().numpy())
    limits = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    expected = (limits <= uniform.numpy()[:, None]).sum(axis=1)
    np.testing.assert_array_equal(sample.draw(logits, uniform).numpy(), expected)


def test_the_frequencies_of_draws_are_the_probabilities() -> None:
    logits = torch.tensor([0.0, -1.0, 2.0, -4.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    tokens = sample.draw(logits.expand(len(uniform), -1), uniform).numpy()
    weights = np.exp(logits.numpy())
    np.testing.assert_allclose(np.bincount(tokens) / len(tokens), weights / weights.sum(), atol=0.01)


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 1), (0.5, 1), (1 - 2.0**-53, 2)])
def test_a_token_without_probability_is_never_drawn(uniform: float, token: int) -> None:
    logits = torch.tensor([[-torch.inf, 4.0, 0.0, -torch.inf]])
    assert sample.draw(logits, torch.tensor([uniform], dtype=torch.float64)).tolist() == [token]


def test_rare_tokens_at_the_end_of_a_large_vocabulary_are_told_apart() -> None:
    # A cumulative sum in float32 is a multiple of 6e-8 here: six such tokens would share one value.
    probabilities = torch.full((1, 200_000), 1e-8, dtype=torch.float64)
    probabilities[0, 0] = 1 - 1e-8 * 199_999
    uniform = 1 - 1e-8 * torch.arange(100, 0, -1, dtype=torch.float64)
    tokens = sample.draw(probabilities.log().expand(100, -1), uniform).numpy()
    assert set(np.diff(tokens)) <= {0, 1, 2}
    assert len(set(tokens)) > 90
