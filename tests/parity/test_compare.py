"""Distances of logits and codes equal their definitions, and NaN never passes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cushion_deploy.core.sites import Site
from cushion_deploy.parity.checks import ParityCheck, ParityReport
from cushion_deploy.parity.compare import common_prefix, compare_codes, compare_logits

FINITE = st.integers(-400, 400).map(lambda n: n / 8)
SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(2, 7))
PAIRS = SHAPES.flatmap(lambda shape: st.tuples(*[hnp.arrays(np.float32, shape, elements=FINITE) for _ in range(2)]))


def softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / math.fsum(powers) for p in powers]


@settings(deadline=None, derandomize=True)
@given(PAIRS)
def test_every_distance_is_its_definition(pair: tuple[np.ndarray, np.ndarray]) -> None:
    a, b = pair
    flat = [x.reshape(-1, x.shape[-1]).tolist() for x in pair]
    rows = list(zip(*flat, strict=True))
    found = compare_logits(a, b)
    differences = [abs(x - y) for row in rows for x, y in zip(*row, strict=True)]
    assert found.maximum == pytest.approx(max(differences), abs=1e-9)
    assert found.mean == pytest.approx(math.fsum(differences) / len(differences), abs=1e-9)
    cosines, divergences, same = [], [], []
    for x, y in rows:
        norm = math.hypot(*x) * math.hypot(*y)
        dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
        cosines.append(dot / norm if norm else 0.0)
        divergences.append(math.fsum(p * math.log(p / q) for p, q in zip(softmax(x), softmax(y), strict=True) if p > 0))
        same.append(x.index(max(x)) == y.index(max(y)))
    assert found.cosine == pytest.approx(min(cosines), abs=1e-6)
    assert found.kl == pytest.approx(sum(divergences) / len(rows), abs=1e-6, rel=1e-6)
    assert found.top1 == sum(same) / len(rows)
    assert found.kl >= -1e-12


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (2, 3, 5), elements=FINITE), st.floats(0.5, 20, width=32))
def test_a_constant_added_to_a_row_is_no_divergence(a: np.ndarray, constant: float) -> None:
    found = compare_logits(a.astype(np.float64), a.astype(np.float64) + constant)
    assert found.maximum == pytest.approx(constant)
    assert found.kl == pytest.approx(0, abs=1e-9)


@settings(deadline=None, derandomize=True)
@given(st.floats(-20, 20), st.floats(-20, 20))
def test_two_tokens_have_the_divergence_of_a_coin(a: float, b: float) -> None:
    p, q = (1 / (1 + math.exp(-x)) for x in (a, b))
    expected = p * (math.log(p) - math.log(q)) + (1 - p) * (math.log1p(-p) - math.log1p(-q))
    found = compare_logits(np.array([[a, 0.0]]), np.array([[b, 0.0]]))
    assert found.kl == pytest.approx(expected, abs=1e-6)


def test_the_direction_is_from_the_reference() -> None:
    a, b = np.array([[0.0, 0.0]]), np.array([[math.log(3), 0.0]])
    assert compare_logits(a, b).kl == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    assert compare_logits(b, a).kl == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("direction", ["at most", "at least"])
def test_one_number_that_is_none_spoils_all_and_fails_every_check(bad: float, side: int, direction) -> None:
    arrays = [np.zeros((1, 3, 4), np.float32), np.zeros((1, 3, 4), np.float32)]
    arrays[side][0, 1, 2] = bad
    found = compare_logits(*arrays)
    values = (found.maximum, found.mean, found.cosine, found.kl, found.top1)
    assert all(math.isnan(v) for v in values)
    for value in values:
        check = ParityCheck("rung", "metric", value, 1e9 if direction == "at most" else -1e9, direction)
        assert not check.passed
        assert check.to_json()["value"] is None
        assert not ParityReport((check,), "text", 1).passed


def test_limits_belong_to_what_passes_and_no_check_is_no_proof() -> None:
    assert ParityCheck("r", "m", 1.0, 1.0, "at most").passed
    assert ParityCheck("r", "m", 1.0, 1.0, "at least").passed
    assert not ParityCheck("r", "m", np.nextafter(1.0, 2), 1.0, "at most").passed
    assert not ParityCheck("r", "m", np.nextafter(1.0, 0), 1.0, "at least").passed
    assert not ParityReport((), "text", 0).passed


def test_words_name_every_distance() -> None:
    words = compare_logits(np.array([[0.0, 0.0]]), np.array([[math.log(3), 0.0]])).words()
    assert words == "max 1.1, mean 0.55, cosine 0.000000, KL 0.14 nats, top-1 100.00 %"


@settings(deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_common_prefix_is_the_longest(a: list[int], b: list[int]) -> None:
    expected = max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
    assert common_prefix(a, b) == expected


CODES = hnp.arrays(np.int8, (1, 3, 4), elements=st.integers(-128, 127))


@settings(deadline=None, derandomize=True)
@given(CODES, CODES)
def test_code_distance_counts_without_wrapping(a: np.ndarray, b: np.ndarray) -> None:
    first, second = Site("layers.1.attn.qkv"), Site("layers.0.mlp.down")
    found = compare_codes({first: a, second: a}, {second: a, first: b})
    assert list(found) == [first, second], "in the order of the reference"
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    assert found[first].identical == pytest.approx(sum(x == y for x, y in pairs) / 12)
    assert found[first].largest == max(abs(x - y) for x, y in pairs)
    assert (found[second].identical, found[second].largest) == (1.0, 0)
