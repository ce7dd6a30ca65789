"""Rotations against Hadamard matrices written out as Kronecker powers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cushion_deploy.core.rotation import hadamard, kronecker_factors, rotate, rotation_block, signs


def sylvester(order: int) -> np.ndarray:
    """Return the Kronecker power of [[1, 1], [1, -1]] of this order, divided by its norm."""
    found = np.ones((1, 1))
    while len(found) < order:
        found = np.kron(np.array([[1, 1], [1, -1]]), found)
    return found / np.sqrt(order)


@pytest.mark.parametrize("order", [1, 2, 8, 64, 128])
def test_the_matrix_is_the_kronecker_power_and_its_own_inverse(order: int) -> None:
    np.testing.assert_allclose(hadamard(order), sylvester(order), atol=1e-7)
    np.testing.assert_array_equal(signs(order) @ signs(order), order * np.eye(order))


@settings(deadline=None, derandomize=True)
@given(power=st.integers(1, 13), blocks=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_each_block_is_multiplied_by_the_whole_matrix(power: int, blocks: int, seed: int) -> None:
    block = 2**power
    x = np.random.default_rng(seed).normal(size=(2, blocks * block))
    found = rotate(x, block, lambda order: hadamard(order).astype(np.float64))
    if block <= 2**10:
        whole = (x.reshape(2, blocks, block) @ sylvester(block)).reshape(x.shape)
        np.testing.assert_allclose(found, whole, atol=1e-5)
    # Orthogonal and its own inverse, at any size.
    np.testing.assert_allclose((found**2).sum(-1), (x**2).sum(-1), rtol=1e-5)
    np.testing.assert_allclose(rotate(found, block, lambda n: hadamard(n).astype(np.float64)), x, atol=1e-4)


@pytest.mark.parametrize("block", [2, 64, 128, 512, 4096, 8192])
def test_a_block_has_as_few_factors_of_at_most_64_as_possible_and_they_are_about_equal(block: int) -> None:
    factors = kronecker_factors(block)
    assert np.prod(factors) == block
    assert max(factors) <= 64
    assert max(factors) <= 2 * min(factors)
    assert len(factors) == (1 if block <= 64 else 2 if block <= 64**2 else 3)
    assert kronecker_factors(512) == (16, 32)


@pytest.mark.parametrize(
    ("width", "limit", "expected"),
    [
        *((1536, 512, 512), (1536, 64, 64), (1536, 100, 64), (1536, 1, 0), (1536, 0, 0)),
        *((11008, 512, 256), (18944, 512, 512), (576, 1000, 64), (4096, 8192, 4096), (63, 64, 0)),
    ],
)
def test_a_block_is_the_largest_power_of_two_that_divides_the_width(width: int, limit: int, expected: int) -> None:
    assert rotation_block(width, limit) == expected
