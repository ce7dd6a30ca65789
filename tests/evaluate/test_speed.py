"""Times are taken in turn and counted as they should be; ratios pair rounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate import speed
from cushion_deploy.evaluate.speed import Times, Workload, compare, time_sessions

CONTRACT = GraphContract(1, 1, 4, 50, 64, "float32", 2)


class Clock:
    """A clock that moves only when a session runs."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Fake:
    """A decoder whose calls take a known time; the first round is ten times slower, as a cold one is."""

    contract = CONTRACT

    def __init__(self, clock: Clock, log: list[str], name: str, prefill: float, decode: float) -> None:
        self.clock, self.log, self.name = clock, log, name
        self.seconds = {True: prefill, False: decode}
        self.rounds = -1
        self.length = 0

    def reset(self) -> None:
        self.length = 0
        self.rounds += 1
        self.log.append(self.name)

    def run(self, ids: np.ndarray, **_: Any) -> None:
        assert ids.dtype == np.int64
        assert 0 <= ids.min() <= ids.max() < CONTRACT.vocab_size
        self.clock.now += self.seconds[self.length == 0] * (10 if self.rounds == 0 else 1)
        self.length += ids.shape[1]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(speed, "time", found)
    return found


def test_rounds_go_in_turn_and_the_first_warms_up(clock: Clock) -> None:
    log: list[str] = []
    sessions = {"a": Fake(clock, log, "a", 0.5, 0.02), "b": Fake(clock, log, "b", 1.0, 0.08)}
    workload = Workload(prompt=8, decoded=4, batch=2, rounds=3)
    times = time_sessions(sessions, workload)
    assert log == ["a", "b"] * 4
    np.testing.assert_allclose(times["a"].prefill, [0.5] * 3, rtol=1e-5)
    np.testing.assert_allclose(times["b"].decode, [0.08] * 12, rtol=1e-5)
    summary = times["a"].summary(workload)
    assert summary["prefill_tokens_per_second"] == pytest.approx(2 * 8 / 0.5, rel=1e-4)
    assert summary["decode_tokens_per_second"] == pytest.approx(2 / 0.02, rel=1e-4)
    assert summary["decode_milliseconds"] == pytest.approx({"p50": 20, "p90": 20, "p99": 20}, rel=1e-4)
    ratio = compare(times["a"], times["b"], workload)
    assert (ratio.prefill, ratio.decode) == pytest.approx((2.0, 4.0), rel=1e-4)


def test_a_machine_that_becomes_slower_does_not_change_the_ratio() -> None:
    load = np.array([1, 3, 9], np.float32)
    workload = Workload(prompt=4, decoded=2, rounds=3)
    ours = Times(load, np.repeat(load, 2))
    theirs = Times(2 * load, 3 * np.repeat(load, 2))
    ratio = compare(ours, theirs, workload)
    assert (ratio.prefill, ratio.decode) == pytest.approx((2.0, 3.0))


def test_percentiles_are_those_of_numpy() -> None:
    decode = np.random.default_rng(0).exponential(size=40).astype(np.float32)
    summary = Times(np.ones(2, np.float32), decode).summary(Workload(rounds=2, decoded=20))
    for p in (50, 90, 99):
        assert summary["decode_milliseconds"][f"p{p}"] == pytest.approx(1e3 * np.percentile(decode, p), rel=1e-4)


def test_a_workload_that_does_not_fit_is_refused(clock: Clock) -> None:
    fake = Fake(clock, [], "a", 1, 1)
    time_sessions({"a": fake}, Workload(prompt=58, decoded=4, rounds=1))
    with pytest.raises(UsageError, match="62 positions"):
        time_sessions({"a": fake}, Workload(prompt=59, decoded=4, rounds=1))
