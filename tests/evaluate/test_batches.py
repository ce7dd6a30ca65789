"""Requests in batches score as each of them does alone under transformers; every context runs once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.errors import CheckFailed
from cushion_deploy.evaluate.batches import SLACK, Row, batches, score_requests
from cushion_deploy.evaluate.scorer import Scorer
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.session import TorchSession

Pair = tuple[list[int], list[int]]


def requests() -> list[Pair]:
    """Contexts of different lengths, some of them with several continuations, in no order."""
    rng = np.random.default_rng(5)
    found: list[Pair] = []
    for length, continuations in ((9, (3, 1, 6)), (12, (2, 2)), (1, (4,)), (40, (5, 30)), (17, (1,)), (44, (2, 9))):
        context = rng.integers(3, 320, length).tolist()
        found += [(context, rng.integers(3, 320, n).tolist()) for n in continuations]
    return [found[i] for i in rng.permutation(len(found))]


def expected(model: TorchRunner, prefix: tuple[int, ...], context: list[int], continuation: list[int]) -> Any:
    """Return transformers' score of a whole row, run at once."""
    with torch.inference_mode():
        logits = model.module(input_ids=torch.tensor([[*prefix, *context, *continuation]])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(prefix) + len(context) - 1 : -1]
    chosen = torch.tensor(continuation)
    return float(rows.gather(1, chosen[:, None]).sum()), bool((rows.argmax(-1) == chosen).all())


@pytest.mark.parametrize("size", [1, 2, 8])
@pytest.mark.parametrize("prefix", [(), (7, 1, 300)])
def test_scores_are_those_of_transformers(tiny_model: TorchRunner, prefix: tuple[int, ...], size: int) -> None:
    pairs = requests()
    # A continuation that greedy decoding produces.
    context = pairs[0][0]
    with torch.inference_mode():
        best = int(tiny_model.module(input_ids=torch.tensor([[*prefix, *context]])).logits[0, -1].argmax())
    pairs.append((context, [best]))
    # Every batch is worth it, so that each way to run requests is taken.
    scorer = Scorer(TorchSession(tiny_model, tiny_model.compute_prefix(prefix)), waste=100)
    found = score_requests(scorer, pairs, size)
    for (value, greedy), pair in zip(found, pairs, strict=True):
        wanted = expected(tiny_model, prefix, *pair)
        assert value == pytest.approx(wanted[0], abs=1e-3)
        assert greedy is wanted[1]
    assert found[-1][1]
    # The cache of a batch must not serve the next request.
    assert scorer.loglikelihood(*pairs[3])[0] == pytest.approx(expected(tiny_model, prefix, *pairs[3])[0], abs=1e-3)


def test_logits_in_pieces_are_the_same(tiny_model: TorchRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(TorchSession(tiny_model, tiny_model.compute_prefix(())), waste=100)
    whole = score_requests(scorer, requests())
    monkeypatch.setattr("cushion_deploy.evaluate.batches.LOGITS", 12)
    for (a, _), (b, _) in zip(score_requests(scorer, requests()), whole, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


class CountingSession:
    """A decoder that counts the tokens that it is fed, ``[rows, tokens]`` in each call."""

    contract = GraphContract(1, 1, 1, 400, 90, "float32", 4)

    def __init__(self, value: float = 0.0) -> None:
        self.length, self.value = 0, value
        self.fed: list[tuple[int, ...]] = []

    def reset(self) -> None:
        self.length = 0

    def truncate(self, length: int) -> None:
        assert length <= self.length
        self.length = length

    def run(self, ids: IntArray, *more: Any, need_logits: str = "last") -> FloatArray | None:
        self.fed.append(ids.shape)
        self.length += ids.shape[1]
        return None if need_logits == "none" else np.full((*ids.shape, 400), self.value, dtype=np.float32)


def test_a_context_runs_once_and_its_continuations_follow() -> None:
    session: Any = CountingSession()
    pairs = [(list(range(first, first + n)), [5] * k) for first, n in ((10, 6), (30, 8)) for k in (1, 4)]
    done: list[tuple[int, int]] = []
    found = score_requests(Scorer(session, waste=2), pairs, progress=lambda task, n, of: done.append((n, of)))
    # Five tokens of both contexts; then the other 1 and 3 of each with the continuations, the last token not fed.
    assert session.fed == [(2, 5), (2, 3), (2, 6)]
    assert done == [(4, 4)]
    assert [value for value, _ in found] == pytest.approx([-np.log(400) * n for n in (1, 4, 1, 4)], rel=1e-5)


def test_a_long_beginning_that_all_contexts_share_runs_once() -> None:
    session: Any = CountingSession()
    pairs = [([*range(50), first], [5]) for first in range(100, 108)]
    score_requests(Scorer(session), pairs, 8)
    assert sum(rows * tokens for rows, tokens in session.fed) == 50 + 8


def test_a_batch_with_much_padding_runs_alone() -> None:
    rows = [Row([i] * 20, [(i, [i] * 20 + [5] * k)]) for i, k in enumerate((1, 40, 1, 1))]
    # 4 x 59 tokens in a batch, and 4 x 20 with 1 + 40 + 1 + 1 alone.
    assert [len(batch) for batch in batches(rows, 8, 1.9)] == [1, 1, 1, 1]
    assert [len(batch) for batch in batches(rows, 8, 2.1)] == [4]


def test_nan_is_an_error() -> None:
    session: Any = CountingSession(np.nan)
    with pytest.raises(CheckFailed, match="NaN"):
        score_requests(Scorer(session), requests())
    assert session.length == 0


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 6))
def test_a_batch_holds_contexts_of_almost_equal_length(lengths: list[int], size: int) -> None:
    rows = [Row([i] * n, [(i, [i] * n + [0])]) for i, n in enumerate(lengths)]
    found = batches(rows, size, 10)
    assert sorted(row.requests[0][0] for batch in found for row in batch) == list(range(len(rows)))
    for batch in found:
        assert 1 <= len(batch) <= size
        assert max(row.length for row in batch) - min(row.length for row in batch) <= SLACK
