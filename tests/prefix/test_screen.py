"""The screen gives every token its own largest activation, as transformers computes it, in fewer layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix import screen
from cushion_deploy.prefix.screen import self_sink_sizes, sink_depth, tokens_to_screen

ALL = np.arange(320)
InputsOf = Callable[..., dict[str, np.ndarray]]


def own_maxima(model: TorchRunner, inputs_of: InputsOf, prefix: tuple[int, ...], token: int) -> np.ndarray:
    """Return the largest own activation of ``token`` behind ``prefix`` in each layer."""
    found = np.zeros(model.spec.num_layers)
    for site, x in inputs_of(model, (*prefix, token)).items():
        layer = int(site.split(".")[1])
        found[layer] = max(found[layer], np.abs(x[-1]).max())
    return found


@pytest.mark.parametrize("prefix", [(), (97,), (5, 200)])
@pytest.mark.parametrize("batch_positions", [100, 2048])
def test_sizes_are_the_brute_force_ones(
    planted_model: TorchRunner, inputs_of: InputsOf, prefix: tuple[int, ...], batch_positions: int
) -> None:
    past = planted_model.past(planted_model.compute_prefix(prefix))
    sizes = self_sink_sizes(planted_model, past, ALL, 2, batch_positions=batch_positions)
    assert sizes.shape == (320,)
    for token in range(0, 320, 5):
        expected = own_maxima(planted_model, inputs_of, prefix, token)[:2].max()
        assert sizes[token] == pytest.approx(expected, rel=1e-3), token


def test_as_many_layers_run_as_the_maxima_need(planted_model: TorchRunner, inputs_of: InputsOf) -> None:
    # Without a prefix every token fires in layer 1 of 3, so nothing is left to find in layer 2.
    assert sink_depth(planted_model, np.random.default_rng(0)) == 2
    sizes = self_sink_sizes(planted_model, KeysValues(), ALL, 2)
    full = [own_maxima(planted_model, inputs_of, (), token).max() for token in range(0, 320, 9)]
    np.testing.assert_allclose(sizes[::9], full, rtol=1e-3)


@pytest.mark.parametrize(
    ("maxima", "depth"),
    [
        ([[1, 2, 3], [0, 0, 0], [0, 0, 0]], 1),
        ([[3, 2, 1], [4, 5, 6], [0, 0, 0]], 2),
        ([[1, 2, 3], [0, 0, 0], [9, 0, 0]], 3),
    ],
)
def test_the_depth_is_where_the_sample_has_its_final_ranking(maxima: list[list[float]], depth: int) -> None:
    assert screen._depth_needed(torch.tensor(maxima, dtype=torch.float32)) == depth


def test_absorbers_come_first(planted_model: TorchRunner, plant: Any) -> None:
    sizes = self_sink_sizes(planted_model, KeysValues(), ALL, 3)
    assert set(np.argsort(-sizes)[:3]) == set(plant.absorbers)
    assert sizes.min() > plant.massive, "at the first position every token becomes a sink"


def test_the_model_is_whole_again_even_after_an_error(tiny_model: TorchRunner) -> None:
    ids = torch.tensor([[5, 6, 7]])
    before = tiny_model.module(input_ids=ids).logits

    def fail(task: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_sink_sizes(tiny_model, KeysValues(), ALL, 2, progress=fail)
    assert tiny_model.module.config.num_hidden_layers == 3
    assert torch.equal(tiny_model.module(input_ids=ids).logits, before)


def test_progress_ends_with_the_whole_vocabulary(tiny_model: TorchRunner) -> None:
    reports: list[tuple[int, int]] = []
    self_sink_sizes(
        tiny_model,
        KeysValues(),
        ALL,
        2,
        batch_positions=128,
        progress=lambda _, done, total: reports.append((done, total)),
    )
    assert reports == [(128, 320), (256, 320), (320, 320)]


def test_a_part_of_the_vocabulary_gets_the_sizes_that_it_has_in_the_whole(planted_model: TorchRunner) -> None:
    tokens = np.array([3, 65, 171, 319])
    whole = self_sink_sizes(planted_model, KeysValues(), ALL, 2)
    np.testing.assert_allclose(self_sink_sizes(planted_model, KeysValues(), tokens, 2), whole[tokens], rtol=1e-5)


def test_the_part_is_a_uniform_sample_of_different_tokens() -> None:
    counts = np.zeros(60, dtype=int)
    for seed in range(500):
        tokens = tokens_to_screen(np.arange(60), 12, np.random.default_rng(seed))
        assert len(set(tokens.tolist())) == 12
        counts[tokens] += 1
    # Each is drawn 100 times of 500 on average, with a standard deviation of 9.
    assert 60 < counts.min() <= counts.max() < 140


@pytest.mark.parametrize("count", [None, 60, 61])
def test_a_small_vocabulary_is_screened_whole(count: int | None) -> None:
    assert tokens_to_screen(np.arange(60), count, np.random.default_rng(0)).tolist() == list(range(60))
