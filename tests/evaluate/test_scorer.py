"""Log likelihoods against transformers; a shared beginning is run once and changes nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.errors import CheckFailed, UsageError
from cushion_deploy.evaluate.perplexity import score_text
from cushion_deploy.evaluate.scorer import Scorer, token_losses
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.session import TorchSession

PREFIX = (7, 1, 300)


def log_probabilities(model: TorchRunner, tokens: list[int]) -> Any:
    """Return transformers' own log probabilities float32 ``[n, vocab]`` of a whole row, run at once."""
    with torch.inference_mode():
        return torch.log_softmax(model.module(input_ids=torch.tensor([tokens])).logits[0].double(), -1)


def expected(model: TorchRunner, prefix: tuple[int, ...], context: list[int], continuation: list[int]) -> Any:
    scores = log_probabilities(model, [*prefix, *context, *continuation])
    rows = scores[len(prefix) + len(context) - 1 : -1]
    chosen = torch.tensor(continuation)
    return float(rows.gather(1, chosen[:, None]).sum()), bool((rows.argmax(-1) == chosen).all())


@pytest.fixture(params=[(), PREFIX], ids=["bare", "prefix"])
def prefix(request: pytest.FixtureRequest) -> tuple[int, ...]:
    tokens: tuple[int, ...] = request.param
    return tokens


@pytest.fixture
def scorer(tiny_model: TorchRunner, prefix: tuple[int, ...]) -> Scorer:
    return Scorer(TorchSession(tiny_model, tiny_model.compute_prefix(prefix)), piece=5)


class CountingSession:
    """A decoder whose logits say that the next token is the last one plus one; counts what it is fed."""

    contract = GraphContract(1, 1, 1, 50, 24, "float32", 4)

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.fed: list[list[int]] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def reset(self) -> None:
        self.tokens = []

    def truncate(self, length: int) -> None:
        assert length <= len(self.tokens)
        self.tokens = self.tokens[:length]

    def run(self, ids: IntArray, *more: Any, need_logits: str = "last") -> FloatArray | None:
        self.fed.append(ids[0].tolist())
        self.tokens += ids[0].tolist()
        logits = np.zeros((1, ids.shape[1], 50), dtype=np.float32)
        logits[0, np.arange(ids.shape[1]), (ids[0] + 1) % 50] = 3.0
        return None if need_logits == "none" else logits


def test_a_continuation_scores_what_transformers_says(
    scorer: Scorer, tiny_model: TorchRunner, prefix: tuple[int, ...], plain_ids: IntArray
) -> None:
    ids = plain_ids.tolist()
    for context, continuation in [(ids[:9], ids[9:13]), (ids[:1], ids[1:2]), (ids[20:40], ids[40:56])]:
        found, greedy = scorer.loglikelihood(context, continuation)
        value, wanted = expected(tiny_model, prefix, context, continuation)
        assert found == pytest.approx(value, abs=1e-3)
        assert greedy is wanted


def test_greedy_is_said_of_the_greedy_continuation_alone(
    scorer: Scorer, tiny_model: TorchRunner, prefix: tuple[int, ...], plain_ids: IntArray
) -> None:
    context = plain_ids[:12].tolist()
    best: list[int] = []
    for _ in range(4):
        best.append(int(log_probabilities(tiny_model, [*prefix, *context, *best])[-1].argmax()))
    assert scorer.loglikelihood(context, best)[1]
    assert not scorer.loglikelihood(context, [*best[:3], (best[3] + 1) % 320])[1]


def test_requests_do_not_depend_on_those_before_them(
    scorer: Scorer, tiny_model: TorchRunner, prefix: tuple[int, ...], plain_ids: IntArray
) -> None:
    ids = plain_ids.tolist()
    requests = [
        (ids[:20], ids[30:33]),
        (ids[:20], ids[40:41]),
        (ids[:20], ids[30:36]),  # begins with the whole first request
        (ids[:7], ids[7:11]),  # shorter than what the cache holds, and all of it in there
        (ids[:7], ids[7:11]),
        (ids[1:7], ids[7:11]),
    ]
    for context, continuation in requests:
        found, _ = scorer.loglikelihood(context, continuation)
        assert found == pytest.approx(expected(tiny_model, prefix, context, continuation)[0], abs=1e-3)


def test_a_shared_context_is_run_once() -> None:
    session = CountingSession()
    scorer = Scorer(session)
    scorer.loglikelihood([5, 6, 7, 8], [9, 10])
    assert session.fed == [[5, 6, 7], [8, 9]]
    session.fed.clear()
    scorer.loglikelihood([5, 6, 7, 8], [20, 21, 22])
    # The last token of the context alone is fed again: its logits predict the first of the continuation.
    assert session.fed == [[8, 20, 21]]
    session.fed.clear()
    scorer.loglikelihood([5, 6, 1], [2])
    assert session.fed == [[1]]


def test_logits_are_asked_for_in_pieces() -> None:
    session = CountingSession()
    Scorer(session, piece=3).nll(np.arange(9)[None])
    assert session.fed == [[0, 1, 2], [3, 4, 5], [6, 7]]


def test_a_context_too_long_loses_its_beginning() -> None:
    session = CountingSession()
    scorer = Scorer(session)
    assert scorer.limit == 20
    scorer.loglikelihood(list(range(30)), [7, 8])
    # Of 32 tokens 21 count: 20 are fed, the last is only scored.
    assert session.tokens == [*range(11, 30), 7]


def test_losses_of_a_text_are_those_of_transformers(
    scorer: Scorer, tiny_model: TorchRunner, prefix: tuple[int, ...], plain_ids: IntArray
) -> None:
    windows = plain_ids[:90].reshape(3, 30)
    losses = []
    for window in windows:
        ids = torch.tensor([[*prefix, *window.tolist()]])
        labels = ids.clone()
        labels[:, : len(prefix) + 1] = -100
        with torch.inference_mode():
            losses.append(float(tiny_model.module(input_ids=ids, labels=labels).loss))
    score = score_text(scorer.nll, windows)
    assert score.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    assert score.losses.shape == (3, 29)


@settings(max_examples=30)
@given(st.integers(1, 6), st.floats(0.1, 300), st.integers(0, 2**32 - 1))
def test_token_losses_are_torchs_cross_entropy(rows: int, size: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((rows, 40)) * size).astype(np.float32)
    targets = rng.integers(0, 40, rows)
    wanted = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    losses, greedy = token_losses(logits, targets)
    np.testing.assert_allclose(losses, wanted.numpy(), rtol=1e-5, atol=2e-6)
    assert greedy.tolist() == (logits.argmax(1) == targets).tolist()


@pytest.mark.parametrize(("context", "continuation"), [([], [1]), ([1], []), ([1], [2] * 21)])
def test_what_cannot_be_scored_is_refused(context: list[int], continuation: list[int]) -> None:
    with pytest.raises(UsageError):
        Scorer(CountingSession()).loglikelihood(context, continuation)


def test_a_model_that_returns_nan_is_no_score() -> None:
    class Broken(CountingSession):
        def run(self, ids: IntArray, *more: Any, need_logits: str = "last") -> FloatArray | None:
            logits = super().run(ids, need_logits=need_logits)
            return None if logits is None else logits * np.nan

    with pytest.raises(CheckFailed, match="NaN"):
        Scorer(Broken()).loglikelihood([1, 2], [3])


def test_a_failed_call_leaves_no_wrong_cache() -> None:
    class Failing(CountingSession):
        fails = False

        def run(self, ids: IntArray, *more: Any, need_logits: str = "last") -> FloatArray | None:
            if self.fails and need_logits == "all":
                raise RuntimeError("out of memory")
            return super().run(ids, need_logits=need_logits)

    session = Failing()
    scorer = Scorer(session)
    scorer.loglikelihood([5, 6, 7], [8])
    session.fails = True
    with pytest.raises(RuntimeError):
        scorer.loglikelihood([5, 9, 10], [11])
    session.fails = False
    session.fed.clear()
    scorer.loglikelihood([5, 9, 10], [12])
    assert session.tokens == [5, 9, 10]
    assert session.fed == [[10]]
