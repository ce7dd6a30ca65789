"""A reserved cache gives what a growing one gives, and copies nothing that it already holds."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from cushion_deploy.modeling.past_key_values import reserved_cache


def states(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, length, size, generator=generator) for size in (4, 5))
    return keys, values


def test_it_returns_what_a_growing_cache_returns() -> None:
    ours, theirs = reserved_cache(2, 9), DynamicCache()
    for step, length in enumerate((3, 1, 1, 4)):
        for layer in range(2):
            new = states(length, 10 * step + layer)
            for found, expected in zip(ours.update(*new, layer), theirs.update(*new, layer), strict=True):
                assert torch.equal(found, expected)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1, 0) == theirs.get_mask_sizes(1, 0)


def test_a_step_moves_nothing() -> None:
    cache = reserved_cache(1, 4)
    first = cache.update(*states(2, 0), 0)
    second = cache.update(*states(1, 1), 0)
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]


def test_more_than_the_capacity_is_an_error() -> None:
    cache = reserved_cache(1, 4)
    cache.update(*states(4, 0), 0)
    with pytest.raises(RuntimeError):
        cache.update(*states(1, 1), 0)
