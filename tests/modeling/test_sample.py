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
