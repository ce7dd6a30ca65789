"""Divergence in chats, against transformers: the original model answers, and keeps the <bos> of its template."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.progress import silent
from cushion_deploy.evaluate.chat import ANSWER_TOKENS, ChatPrompts
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.teacher import Fidelity, Teacher
from cushion_deploy.stages.chat import ChatFidelity, ChatWindows, chat_scores

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
    assert chat is not None
    rows = chat.ids
    np.testing.assert_array_equal(rows[:, :30], ids)
    assert rows.shape[1] == 30 + ANSWER_TOKENS
    p = log_probabilities(tiny_model.module, begin, rows)
    q = log_probabilities(tiny_model.module, PREFIX, rows)
    found = chat.compare(tiny_model, tiny_model.compute_prefix(PREFIX), silent, "")
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found.prompt.divergences, expected[:, :29], rtol=2e-3, atol=1e-5)
    np.testing.assert_allclose(found.answer.divergences, expected[:, 29:], rtol=2e-3, atol=1e-5)
    itself = chat.compare(tiny_model, tiny_model.compute_prefix(()), silent, "")
    np.testing.assert_allclose(itself.prompt.divergences, 0, atol=1e-5)
    np.testing.assert_allclose(itself.answer.divergences, 0, atol=1e-5)


@pytest.mark.parametrize("begin", [(BOS,), ()])
def test_the_answer_is_what_transformers_generates(
    tiny_model: TorchRunner, plain_ids: IntArray, begin: tuple[int, ...]
) -> None:
    ids = plain_ids[:60].reshape(2, 30)
    asked = torch.tensor([[*begin, *row] for row in ids.tolist()])
    free = tiny_model.module.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=ANSWER_TOKENS, eos_token_id=None, do_sample=False
    )
    # A token of the answer ends it, as far as the model is concerned: it must go on with the second best.
    ends = (int(free[0, asked.shape[1] + 1]),)
    expected = tiny_model.module.generate(
        asked,
        attention_mask=torch.ones_like(asked),
        max_new_tokens=ANSWER_TOKENS,
        min_new_tokens=ANSWER_TOKENS,
        eos_token_id=list(ends),
        pad_token_id=0,
        do_sample=False,
    )
    chat = ChatWindows.of(Teacher(tiny_model), ChatPrompts(ids, begin, ends), silent)
    assert chat is not None
    np.testing.assert_array_equal(chat.bare, expected.numpy())


def test_no_positions_no_chats(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    room = tiny_model.spec.max_positions - tiny_model.spec.max_positions // 8
    ids = np.resize(plain_ids, (2, room))
    assert ChatWindows.of(Teacher(tiny_model), ChatPrompts(ids), silent) is None
    few = ChatWindows.of(Teacher(tiny_model), ChatPrompts(ids[:, :-2]), silent)
    assert few is not None
    assert few.answer == 2
    assert ChatWindows.of(Teacher(tiny_model), ChatPrompts(ids[:0], missing="none"), silent) is None


def test_the_error_is_that_of_the_mean_over_prompts() -> None:
    divergences = np.random.default_rng(0).random((5, 40)).astype(np.float32)
    # What stands before the message is the same in every prompt.
    divergences[:, :20] = divergences[0, :20]
    whole = Fidelity(divergences, divergences)
    scores = chat_scores({"fp": ChatFidelity(whole.part(slice(0, 30)), whole.part(slice(30, None)))})
    prompt, answer = divergences[:, :30].mean(axis=1), divergences[:, 30:].mean(axis=1)
    assert scores["prompt"]["fp"] == pytest.approx(prompt.mean(), rel=1e-5)
    assert scores["prompt_stderr"]["fp"] == pytest.approx(prompt.std(ddof=1) / np.sqrt(5), rel=1e-4)
    assert scores["answer"]["fp"] == pytest.approx(answer.mean(), rel=1e-5)
    assert scores["answer_stderr"]["fp"] == pytest.approx(answer.std(ddof=1) / np.sqrt(5), rel=1e-4)
