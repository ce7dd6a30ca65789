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
    nll = np.stack([planted_model.token_nll(row[None], prefix)[0] for row in windows])
    np.testing.assert_allclose(found.losses, nll, rtol=1e-4, atol=1e-5)
    p = log_softmax(planted_model.logits(windows, Prefix.empty(planted_model.spec)))[:, :-1]
    q = log_softmax(planted_model.logits(windows, prefix))[:, :-1]
    apart = (np.exp(p) * (p - q)).sum(-1)
    assert found.divergences.shape == (2, 31)
    assert found.divergence == pytest.approx(apart.mean(), rel=1e-3)
    assert found.divergence_stderr == pytest.approx(apart.std(ddof=1) / np.sqrt(62), rel=1e-3)
    # Without the predictions that the tokens 0 to 15 of each window make.
    assert found.later.divergence == pytest.approx(apart[:, 16:].mean(), rel=1e-3)
    assert found.later.divergence_stderr == pytest.approx(apart[:, 16:].std(ddof=1) / np.sqrt(30), rel=1e-3)
    assert found.later.divergence != pytest.approx(found.divergence, rel=0.02)
    itself = teacher.compare(planted_model, Prefix.empty(planted_model.spec), windows)
    assert itself.divergence == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("length", "later"), [(16, 0), (17, 0), (18, 1)])
def test_a_short_window_may_have_no_later_prediction(
    tiny_model: TorchRunner, plain_ids: IntArray, length: int, later: int
) -> None:
    windows = plain_ids[:length][None]
    teacher = Teacher(tiny_model)
    teacher.remember(windows)
    found = teacher.compare(tiny_model, tiny_model.compute_prefix((97,)), windows).later
    assert found.divergences.shape == (1, later)
    assert np.isfinite(found.divergence) == bool(later)


def test_divergence_is_kullback_leibler_and_impossible_tokens_count_nothing() -> None:
    p = torch.tensor([0.5, 0.25, 0.25]).log()
    q = torch.tensor([0.25, 0.25, 0.5]).log()
    assert float(divergence(q, p)) == pytest.approx(0.5 * np.log(2) - 0.25 * np.log(2))
    impossible = torch.tensor([0.0, -200.0])
    assert float(divergence(torch.tensor([0.0, -150.0]), impossible)) == pytest.approx(0, abs=1e-20)
