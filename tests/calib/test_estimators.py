"""Range estimators against the raw data that the histogram stands for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cushion_deploy.calib.estimators import BINS, MagnitudeHistogram, RangeEstimator
from cushion_deploy.errors import UsageError


def below_a_limit(values: np.ndarray) -> np.ndarray:
    """Replace powers of two, which are limits and may count one bin lower, by the number before them."""
    return np.where(np.frexp(values)[0] == 0.5, np.nextafter(values, np.float32(0)), values)


MAGNITUDES = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(2.0**-20, 2.0**20, width=32)).map(
    below_a_limit
)


def fill(batches: list[np.ndarray]) -> MagnitudeHistogram:
    """Return the histogram of batches of magnitudes, counted by numpy."""
    histogram = MagnitudeHistogram()
    for batch in batches:
        histogram.cover(float(batch.max()))
        counts, _ = np.histogram(batch.astype(np.float64), bins=BINS, range=(0.0, histogram.limit))
        histogram.add(counts.astype(np.int64))
    return histogram


def squared_error(x: np.ndarray, t: float, bits: int = 8) -> float:
    limit = 2 ** (bits - 1) - 1
    step = t / limit
    return float(((x - np.minimum(np.rint(x / step), limit) * step) ** 2).sum())


@settings(deadline=None, derandomize=True)
@given(st.lists(MAGNITUDES, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_batches_does_not_matter(batches: list[np.ndarray], random: object) -> None:
    shuffled = list(batches)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = fill(batches), fill(shuffled)
    assert (one.limit, one.amax) == (other.limit, other.amax)
    np.testing.assert_array_equal(one.counts, other.counts)


@settings(deadline=None, derandomize=True)
@given(st.lists(MAGNITUDES, min_size=1, max_size=5))
def test_growing_batch_by_batch_equals_counting_everything_at_once(batches: list[np.ndarray]) -> None:
    grown, whole = fill(batches), fill([np.concatenate(batches)])
    assert grown.limit == whole.limit
    assert np.log2(grown.limit) % 1 == 0
    assert grown.limit / 2 < max(b.max() for b in batches) <= grown.limit
    np.testing.assert_array_equal(grown.counts, whole.counts)
    assert grown.counts.sum() == sum(len(b) for b in batches)


@settings(deadline=None, derandomize=True)
@given(st.lists(MAGNITUDES, min_size=1, max_size=5))
def test_max_is_the_exact_maximum(batches: list[np.ndarray]) -> None:
    assert RangeEstimator("max").threshold(fill(batches)) == max(float(b.max()) for b in batches)


@settings(deadline=None, derandomize=True)
@given(MAGNITUDES, st.floats(50.5, 100))
def test_percentile_is_numpys_within_one_bin(x: np.ndarray, percentile: float) -> None:
    histogram = fill([x])
    found = RangeEstimator("percentile", percentile).threshold(histogram)
    width = histogram.limit / BINS
    # The smallest value below or at which that share lies.
    expected = float(np.quantile(x.astype(np.float64), percentile / 100, method="inverted_cdf"))
    assert expected - 1e-6 * width <= found <= expected + width * (1 + 1e-6)
    assert found <= float(x.max())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["normal", "laplace", "outlier", "uniform", "constant"])
def test_no_threshold_is_clearly_better_than_the_least_squares_one(kind: str, bits: int) -> None:
    rng = np.random.default_rng(7)
    x = {
        "normal": np.abs(rng.standard_normal(20_000)),
        "laplace": np.abs(rng.laplace(size=20_000)),
        "outlier": np.abs(np.append(rng.standard_normal(20_000), [40.0, 60.0])),
        "uniform": rng.uniform(0, 1, 20_000),
        "constant": np.full(100, 0.75),
    }[kind].astype(np.float32)
    histogram = fill([x])
    found = RangeEstimator("mse").threshold(histogram, bits)
    assert 0 < found <= histogram.amax
    values = x.astype(np.float64)
    best = min(squared_error(values, t, bits) for t in np.linspace(0.01, 1.0, 1000) * histogram.amax)
    # Moving each value by half a bin changes the root of the error by at most that much.
    slack = np.sqrt(len(values)) * histogram.limit / BINS
    assert np.sqrt(squared_error(values, found, bits)) <= 1.02 * np.sqrt(best) + slack


def test_least_squares_clips_a_lone_outlier_and_max_does_not() -> None:
    x = np.append(np.abs(np.random.default_rng(0).standard_normal(100_000)), 40.0).astype(np.float32)
    histogram = fill([x])
    assert RangeEstimator("max").threshold(histogram) == 40.0
    assert RangeEstimator("mse").threshold(histogram) < 30.0
    assert RangeEstimator("percentile", 99.9).threshold(histogram) == pytest.approx(3.29, abs=0.1)


def test_a_power_of_two_as_maximum_lies_inside() -> None:
    histogram = fill([np.array([1.0, 2.0, 4.0], dtype=np.float32)])
    assert histogram.limit == 4.0
    assert histogram.counts.sum() == 3


def test_centers_lie_in_the_middle_of_numpys_bins() -> None:
    histogram = fill([np.array([3.0], dtype=np.float32)])
    edges = np.histogram_bin_edges([], bins=BINS, range=(0.0, 4.0))
    np.testing.assert_allclose(histogram.centers, (edges[1:] + edges[:-1]) / 2)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 2).map(sorted), min_size=1, max_size=5))
def test_the_signed_range_is_that_of_all_batches_and_zero(ranges: list[list[float]]) -> None:
    histogram = MagnitudeHistogram()
    for low, high in ranges:
        histogram.widen(low, high)
    ends = [0.0, *(end for pair in ranges for end in pair)]
    assert RangeEstimator("max").signed_range(histogram) == (min(ends), max(ends))


@pytest.mark.parametrize("estimator", ["percentile", "mse"])
def test_only_max_has_an_asymmetric_form(estimator: str) -> None:
    with pytest.raises(UsageError, match=f"estimator {estimator} has no asymmetric form") as e:
        RangeEstimator(estimator).signed_range(MagnitudeHistogram())  # type: ignore[arg-type]
    assert "max" in e.value.hint
