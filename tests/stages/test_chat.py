"""Divergence at the begin of a chat, against transformers: the original model keeps the <bos> of its template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.progress import silent
from cushion_deploy.evaluate.chat import ChatPrompts
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.teacher import Fidelity, Teacher
from cushion_deploy.stages.chat import ChatWindows, chat_scores

BOS = 1
PREFIX = (97, 5)


def log_probabilities(module: Any, before: tuple[int, ...], ids: IntArray) -> np.ndarray:
    """Return transformers' log probabilities of the tokens 1.. of each row behind some tokens, in float64."""
    rows = torch.tensor([[*before, *row] for row in ids.tolist()])
    with torch.inference_mode():
        logits = module(input_ids=rows, use_cache=False).logits[:, len(before) : -1]
    return np.asarray(torch.log_softmax(logits.double(), -1).numpy())


@pytest.mark.parametrize("begin", [(BOS,), ()])
def test_a_prefix_takes_the_place_of_bos(tiny_model: TorchRunner, plain_ids: IntArray, begin: tuple[int, ...]) -> None:
    ids = plain_ids[:60].reshape(2, 30)
    chat = ChatWindows.of(Teacher(tiny_model), ChatPrompts(ids, begin), silent)
    p = log_probabilities(tiny_model.module, begin, ids)
    q = log_probabilities(tiny_model.module, PREFIX, ids)
    found = chat.compare(tiny_model, tiny_model.compute_prefix(PREFIX), silent, "")
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found.divergences, expected, rtol=2e-3, atol=1e-5)
    itself = chat.compare(tiny_model, tiny_model.compute_prefix(()), silent, "")
    assert itself.divergences.shape == (2, 29)
    np.testing.assert_allclose(itself.divergences, 0, atol=1e-5)


def test_the_error_is_that_of_the_mean_over_prompts() -> None:
    divergences = np.random.default_rng(0).random((5, 40)).astype(np.float32)
    # What stands before the message is the same in every prompt.
    divergences[:, :20] = divergences[0, :20]
    scores = chat_scores({"fp": Fidelity(divergences, divergences)})
    whole, later = divergences.mean(axis=1), divergences[:, 16:].mean(axis=1)
    assert scores["divergence"]["fp"] == pytest.approx(whole.mean(), rel=1e-5)
    assert scores["divergence_stderr"]["fp"] == pytest.approx(whole.std(ddof=1) / np.sqrt(5), rel=1e-4)
    assert scores["kl_after_16"]["fp"] == pytest.approx(later.mean(), rel=1e-5)
    assert scores["kl_after_16_stderr"]["fp"] == pytest.approx(later.std(ddof=1) / np.sqrt(5), rel=1e-4)


def test_short_prompts_have_no_later_divergence() -> None:
    short = np.ones((3, 10), dtype=np.float32)
    scores = chat_scores({"fp": Fidelity(short, short)})
    assert scores["kl_after_16"] == scores["kl_after_16_stderr"] == {"fp": None}
