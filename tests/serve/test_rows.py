"""Rows that join and leave a batch, against each row alone in a session of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.session import HeldCache, RowSlice
from cushion_deploy.errors import UsageError
from cushion_deploy.serve.kv_pool import KvPool
from cushion_deploy.serve.rows import BatchedRows, SingleRow, open_rows

TOLERANCE = 2e-4


def alone(tiny: Any, ids: list[int]) -> Any:
    """Return the logits after a text that nothing else shares a session with."""
    return tiny.session().run(np.array([ids]), need_logits="last")[0, -1]


def test_rows_join_and_leave_at_any_token_with_the_logits_of_each_alone(tiny: Any) -> None:
    random = np.random.default_rng(0)
    rows = BatchedRows(tiny.session(), 4, KvPool(0))
    texts: dict[int, list[int]] = {}
    for step in range(40):
        if len(texts) < 4 and random.random() < 0.5:
            prompt = random.integers(3, 380, random.integers(1, 20)).tolist()
            assert rows.open(step, prompt) == 0
            cut = int(random.integers(0, len(prompt)))
            if cut:
                assert rows.prefill(step, prompt[:cut], last=False) is None
            logits = rows.prefill(step, prompt[cut:], last=True)
            np.testing.assert_allclose(logits, alone(tiny, prompt), atol=TOLERANCE)
            texts[step] = prompt
        for key in [key for key in texts if random.random() < 0.15]:
            rows.close(key)
            del texts[key]
        fed = {key: int(random.integers(3, 380)) for key in texts if random.random() < 0.9}
        if not fed:
            continue
        for key, token in fed.items():
            texts[key].append(token)
        for key, logits in rows.decode(fed).items():
            np.testing.assert_allclose(logits, alone(tiny, texts[key]), atol=TOLERANCE)


def test_a_batch_that_stays_the_same_is_not_copied(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    session = tiny.session()
    rows = BatchedRows(session, 4, KvPool(0))
    for key, prompt in enumerate([[5, 6, 7], [8], [9, 10]]):
        rows.open(key, prompt)
        rows.prefill(key, prompt, last=True)
    calls = []
    monkeypatch.setattr(session, "gather", lambda s, gather=session.gather: calls.append(len(s)) or gather(s))
    for _ in range(3):
        rows.decode({0: 11, 1: 12, 2: 13})
    assert calls == [3]
    rows.close(1)
    rows.decode({0: 11, 2: 13})
    assert calls == [3, 2]


@pytest.mark.parametrize("single", [False, True])
def test_a_known_beginning_is_not_computed_again_and_gives_the_same_logits(tiny: Any, single: bool) -> None:
    session = tiny.session()
    rows = SingleRow(session) if single else BatchedRows(session, 2, KvPool(1 << 24))
    first = list(range(20, 50))
    assert rows.open(0, first) == 0
    rows.prefill(0, first, last=True)
    rows.decode({0: 77})
    rows.close(0)
    for text, reused in [([*first, 77, 60, 61], 31), ([*first[:10], 99], 10), ([*first[:10], 99], 10)]:
        assert rows.open(1, text) == reused
        logits = rows.prefill(1, text[reused:], last=True)
        np.testing.assert_allclose(logits, alone(tiny, text), atol=TOLERANCE)
        rows.close(1)


def test_a_session_that_cannot_batch_gets_one_row() -> None:
    class Plain:
        contract: Any = None
        length = 0

        def run(self, *_: Any, **__: Any) -> None: ...

        def reset(self) -> None: ...

        def truncate(self, length: int) -> None: ...

        def close(self) -> None: ...

    assert open_rows(Plain(), 8, KvPool(0)).capacity == 1


def test_rows_without_tokens_cannot_be_gathered(tiny: Any) -> None:
    session = tiny.session()
    for slices in ([], [RowSlice(HeldCache(), 0, 0, 0)]):
        with pytest.raises(UsageError, match="without a token"):
            session.gather(slices)


def held(length: int, nbytes: int | None = None) -> HeldCache:
    return HeldCache((), 1, length, length if nbytes is None else nbytes)


def test_the_pool_evicts_what_was_used_longest_ago() -> None:
    pool = KvPool(6)
    pool.add([1, 2], held(2))
    pool.add([3, 4], held(2))
    pool.add([5, 6], held(2))
    assert pool.find([1, 2, 9]).length == 2
    pool.add([7, 8], held(2))
    assert [pool.find([a, a + 1, 0]).length for a in (1, 3, 5, 7)] == [2, 0, 2, 2]
    assert (pool.nbytes, len(pool), pool.evictions) == (6, 3, 1)
    pool.add(list(range(7)), held(7))
    assert len(pool) == 3


def test_the_pool_keeps_the_longer_of_two_texts_with_the_same_beginning() -> None:
    pool = KvPool(100)
    pool.add([1, 2], held(2))
    pool.add([1, 2, 3], held(3))
    pool.add([1], held(1))
    assert len(pool) == 1
    assert pool.find([1, 2, 3, 4]).length == 3
    assert pool.find([1, 2, 3]).length == 2
    assert pool.find([1, 7, 3]).length == 1
    assert pool.find([2]).length == 0
