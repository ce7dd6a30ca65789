"""Means and standard errors against numpy, and what cannot have one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cushion_deploy.core.statistics import mean, standard_error


def test_the_standard_error_is_the_spread_of_repeated_means() -> None:
    draws = np.random.default_rng(0).exponential(2.0, (4000, 50)).astype(np.float32)
    found = np.mean([standard_error(row) for row in draws])
    assert found == pytest.approx(draws.mean(axis=1).std(), rel=0.05)


def test_rows_count_as_one_sample() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert mean(values) == 5.5
    assert standard_error(values) == pytest.approx(math.sqrt(np.arange(12).var(ddof=1) / 12))


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_what_has_no_error_is_not_a_number(values: list[float]) -> None:
    assert math.isnan(standard_error(np.array(values, dtype=np.float32)))


def test_the_mean_of_nothing_is_not_a_number() -> None:
    assert math.isnan(mean(np.zeros((3, 0), dtype=np.float32)))
