"""Perplexity against transformers' own loss, for the model alone and behind a prefix."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import TextScore, cut_windows, nll_of_logits, score_text
from cushion_deploy.modeling.runner import TorchRunner


@pytest.mark.parametrize("tokens", [(), (7, 1)])
def test_perplexity_is_that_of_transformers_loss(
    tiny_model: TorchRunner, plain_ids: IntArray, tokens: tuple[int, ...]
) -> None:
    windows = plain_ids[:90].reshape(3, 30)
    losses = []
    for window in windows:
        ids = torch.tensor([[*tokens, *window.tolist()]])
        labels = ids.clone()
        labels[:, : len(tokens) + 1] = -100
        with torch.inference_mode():
            losses.append(float(tiny_model.module(input_ids=ids, labels=labels).loss))
    prefix = tiny_model.compute_prefix(tokens)
    found = score_text(lambda ids: tiny_model.token_nll(ids, prefix), windows).perplexity
    assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def test_each_window_is_run_alone_and_reported() -> None:
    windows, shapes, reports = np.arange(12).reshape(3, 4), [], []

    def nll(ids: IntArray) -> Any:
        shapes.append(ids.tolist())
        return np.full((1, 3), math.log(5.0), dtype=np.float32)

    found = score_text(nll, windows, lambda *report: reports.append(report), "task").perplexity
    assert found == pytest.approx(5.0)
    assert shapes == [[row] for row in windows.tolist()]
    assert reports == [("task", 1, 3), ("task", 2, 3), ("task", 3, 3)]


@pytest.mark.parametrize("loss", [800.0, 1e30, math.inf])
def test_a_loss_beyond_exp_is_infinite_perplexity(loss: float) -> None:
    assert TextScore(np.full((2, 3), loss, dtype=np.float32)).perplexity == math.inf


def test_a_loss_that_is_not_a_number_is_never_a_finite_perplexity() -> None:
    assert not math.isfinite(TextScore(np.full((1, 3), np.nan, dtype=np.float32)).perplexity)


@given(st.integers(0, 200), st.integers(2, 40), st.none() | st.integers(2, 120))
def test_windows_are_cut_from_the_start_without_overlap(length: int, window: int, most: int | None) -> None:
    ids, count = np.arange(length), min(length, most or 1000) // window
    if count == 0:
        with pytest.raises(UsageError, match=f"text holds {length} tokens"):
            cut_windows(ids, window, most, "text")
        return
    found = cut_windows(ids, window, most, "text")
    windows = found.ids
    assert found.text_tokens == length
    assert windows.shape == (count, window)
    assert windows.ravel().tolist() == list(range(count * window))


def test_losses_of_logits_are_torchs_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((2, 7, 11)) * 50).astype(np.float32)
    ids = rng.integers(0, 11, (2, 7))
    scores = torch.from_numpy(logits[:, :-1]).double().flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(scores, torch.from_numpy(ids[:, 1:]).flatten(), reduction="none")
    np.testing.assert_allclose(nll_of_logits(logits, ids).ravel(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    logits = np.zeros((1, 2, 3), dtype=np.float32)
    logits[0, 0] = [1e5, -1e5, 0]
    assert nll_of_logits(logits, np.array([[0, 0]])).tolist() == [[0.0]]
    assert nll_of_logits(logits, np.array([[0, 1]])).tolist() == [[2e5]]
