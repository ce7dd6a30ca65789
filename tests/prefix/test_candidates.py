"""Candidates come from four sources, each token once, with every source that named it."""

from __future__ import annotations

import numpy as np

from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.candidates import OBVIOUS, count_sources, gather_candidates, largest, obvious_tokens


def test_obvious_tokens_are_special_ones_and_single_tokens_of_separators(tiny_model: TorchRunner) -> None:
    found = obvious_tokens(tiny_model)
    assert found[:2] == [1, 2]
    texts = [tiny_model.token_text(i) for i in found[2:]]
    assert set(texts) <= set(OBVIOUS)
    assert {"\n", " ", ".", "0", "9"} <= set(texts)
    assert len(found) == len(set(found))


def test_both_screens_name_theirs_and_the_rest_is_random(tiny_model: TorchRunner) -> None:
    found = gather_candidates(tiny_model, range(310, 320), range(300, 315), 25, np.random.default_rng(3))
    named = {
        name: {t for t, sources in found.items() if name in sources}
        for name in ("obvious", "self-sink", "gradient", "random")
    }
    assert named["obvious"] == set(obvious_tokens(tiny_model))
    assert named["self-sink"] == set(range(310, 320))
    assert named["gradient"] == set(range(300, 315))
    assert len(named["random"]) == 25
    assert set().union(*named.values()) == set(found)
    assert all(type(t) is int and 0 <= t < 320 for t in found)


def test_a_token_keeps_every_source_that_named_it(tiny_model: TorchRunner) -> None:
    obvious = obvious_tokens(tiny_model)[0]
    found = gather_candidates(tiny_model, [obvious, 310], [obvious, 310, 311], 320, np.random.default_rng(0))
    assert found[obvious] == ("obvious", "self-sink", "gradient", "random")
    assert found[310] == ("self-sink", "gradient", "random")
    assert found[311] == ("gradient", "random")


def test_every_source_of_a_token_is_counted(tiny_model: TorchRunner) -> None:
    found = gather_candidates(tiny_model, [310, 312], [310, 311], 0, np.random.default_rng(0))
    assert count_sources(found, found) == {"obvious": len(obvious_tokens(tiny_model)), "self-sink": 2, "gradient": 2}
    assert count_sources(found, [310, 311]) == {"self-sink": 1, "gradient": 2}


def test_the_largest_come_first() -> None:
    values = np.array([0.5, 3, 1, 3, -2], dtype=np.float32)
    assert largest(values, 3) == [1, 3, 2]
    assert largest(values, 0) == []


def test_the_generator_decides_the_random_ones(tiny_model: TorchRunner) -> None:
    one, same, other = (gather_candidates(tiny_model, [], [], 20, np.random.default_rng(s)) for s in (1, 1, 2))
    assert list(one.items()) == list(same.items())
    assert one != other


def test_more_than_the_vocabulary_is_the_vocabulary(tiny_model: TorchRunner) -> None:
    found = gather_candidates(tiny_model, range(320), [], 10_000, np.random.default_rng(0))
    assert sorted(found) == list(range(320))
    assert set(gather_candidates(tiny_model, [], [], 0, np.random.default_rng(0)).values()) == {("obvious",)}
