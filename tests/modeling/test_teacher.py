"""The teacher remembers what the original model said, exactly, and measures distance from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.teacher import Teacher, divergence


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Return log probabilities in float64."""
    x = x.astype(np.float64)
    shifted = x - x.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def test_remembered_windows_give_the_probabilities_of_the_model(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    windows = plain_ids[:96].reshape(3, 32)
    teacher = Teacher(tiny_model)
    teacher.remember(windows)
    expected = log_softmax(tiny_model.logits(windows[[2, 0]], Prefix.empty(tiny_model.spec)))[:, :-1]
    np.testing.assert_allclose(teacher.log_probabilities(windows[[2, 0]]).numpy(), expected, atol=1e-5)


def test_a_model_is_compared_by_loss_and_divergence(planted_model: TorchRunner, plain_ids: IntArray) -> None:
    windows = plain_ids[:64].reshape(2, 32)
    prefix = planted_model.compute_prefix((97,))
    teacher = Teacher(planted_model)
    teacher.remember(windows)
    found = teacher.compare(planted_model, prefix, windows)
    nll = np.concatenate([planted_model.token_nll(row[None], prefix)[0] for row in windows])
    np.testing.assert_allclose(found.losses, nll, rtol=1e-4, atol=1e-5)
    p = log_softmax(planted_model.logits(windows, Prefix.empty(planted_model.spec)))[:, :-1]
    q = log_softmax(planted_model.logits(windows, prefix))[:, :-1]
    assert found.divergence == pytest.approx((np.exp(p) * (p - q)).sum(-1).mean(), rel=1e-3)
    itself = teacher.compare(planted_model, Prefix.empty(planted_model.spec), windows)
    assert itself.divergence == pytest.approx(0, abs=1e-6)


def test_divergence_is_kullback_leibler_and_impossible_tokens_count_nothing() -> None:
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    q = torch.tensor([0.25, 0.25, 0.5]).log()
    assert float(divergence(q, p)) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    impossible = torch.tensor([0.0, -200.0])
    assert float(divergence(torch.tensor([0.0, -150.0]), impossible)) == pytest.approx(0, abs=1e-20)
