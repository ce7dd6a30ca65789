"""Candidates come from three sources, each token once."""

from __future__ import annotations

import numpy as np

from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.prefix.candidates import OBVIOUS, gather_candidates, obvious_tokens


def test_obvious_tokens_are_special_ones_and_single_tokens_of_separators(tiny_model: LoadedModel) -> None:
    found = obvious_tokens(tiny_model)
    assert found[:2] == [1, 2]
    texts = [tiny_model.token_text(i) for i in found[2:]]
    assert set(texts) <= set(OBVIOUS)
    assert {"\n", " ", ".", "0", "9"} <= set(texts)
    assert len(found) == len(set(found))


def test_the_screen_gives_its_largest_and_the_rest_is_random(tiny_model: LoadedModel) -> None:
    sizes = np.linspace(0, 1, 320, dtype=np.float32)
    obvious = set(obvious_tokens(tiny_model))
    found = gather_candidates(tiny_model, sizes, 10, 25, np.random.default_rng(3))
    assert {t for t, source in found.items() if source == "obvious"} == obvious
    assert {t for t, source in found.items() if source == "screen"} == set(range(310, 320)) - obvious
    drawn = {t for t, source in found.items() if source == "random"}
    assert 15 <= len(drawn) <= 25
    assert all(type(t) is int and 0 <= t < 320 for t in found)


def test_the_generator_decides_the_random_ones(tiny_model: LoadedModel) -> None:
    sizes = np.zeros(320, dtype=np.float32)
    one, same, other = (gather_candidates(tiny_model, sizes, 4, 20, np.random.default_rng(s)) for s in (1, 1, 2))
    assert list(one.items()) == list(same.items())
    assert one != other


def test_more_than_the_vocabulary_is_the_vocabulary(tiny_model: LoadedModel) -> None:
    sizes = np.zeros(320, dtype=np.float32)
    found = gather_candidates(tiny_model, sizes, 10_000, 10_000, np.random.default_rng(0))
    assert sorted(found) == list(range(320))
    assert set(gather_candidates(tiny_model, sizes, 0, 0, np.random.default_rng(0)).values()) == {"obvious"}
