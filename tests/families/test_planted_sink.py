"""A sink that is written into a model of any family is found, and the prefix removes it, also beyond a window."""

from __future__ import annotations

from typing import Any

import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.recipe import Search

SETTINGS = Search(
    text_tokens=48, random_candidates=32, screen_candidates=16, gradient_candidates=16, audit_tokens=8, max_length=2
)


def largest_by_position(model: TorchRunner, plant: Any, prefix: Prefix, text: IntArray) -> torch.Tensor:
    """Return the largest magnitude that enters the planted layer's last linear at each token of the text."""
    seen: list[torch.Tensor] = []
    path = f"{model.family.layer(plant.layer)}.{model.family.sites[3].linears[0]}"
    hook = model.module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.logits(text[None], prefix)
    hook.remove()
    return seen[0].reshape(len(text), -1).abs().amax(dim=1)


def test_the_search_finds_a_prefix_that_removes_the_sink(planted: TorchRunner, one_sided: IntArray, plant: Any) -> None:
    before = largest_by_position(planted, plant, Prefix.empty(planted.spec), one_sided)
    assert before[0] > plant.massive
    assert before[0] > 20 * before[:24].median()
    assert bool(before[36:].max() > plant.massive) == bool(planted.spec.windows), "windows show one class alone"
    prefix, trace = PrefixSearch(planted, one_sided, SETTINGS).run()
    assert trace.steps[0].accepted
    assert prefix.length >= 1
    behind = largest_by_position(planted, plant, prefix, one_sided)
    assert behind.max() < plant.massive / 2
    assert behind.max() < before[0] / 4


def test_an_absorber_removes_the_sink_from_every_text(planted: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    absorber = planted.compute_prefix(plant.absorbers[:1])
    for start in (0, 100, 200):
        text = plain_ids[start : start + 48]
        assert largest_by_position(planted, plant, Prefix.empty(planted.spec), text)[0] > plant.massive
        assert largest_by_position(planted, plant, absorber, text).max() < plant.massive / 2
