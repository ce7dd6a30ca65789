"""A sink that is written into a model of any family is found, and the prefix that is found removes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.recipe import Search

WIDE = {"sliding_window": 4096}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "mistral": ("mistral", WIDE),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {**WIDE, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**WIDE, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.1}),
    "bloom": ("bloom", {"n_layer": 3, "n_head": 4}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96, "n_positions": 256}),
}
SETTINGS = Search(
    text_tokens=48, random_candidates=32, screen_candidates=16, gradient_candidates=16, audit_tokens=8, max_length=2
)


@pytest.fixture(params=FAMILIES, scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: Any, tiny_writer: Any, sink_planter: Any) -> TorchRunner:
    """Return a model of each family with the planted sink."""
    model_type, options = FAMILIES[request.param]
    folder = tiny_writer(tmp_path_factory.mktemp("planted"), sink_planter, model_type, **options)
    return load_folder(folder, resolve_source(str(folder)))


def largest_by_position(model: TorchRunner, plant: Any, tokens: tuple[int, ...], text: IntArray) -> torch.Tensor:
    """Return the largest magnitude that enters the planted layer's last linear at each token of the text."""
    seen: list[torch.Tensor] = []
    path = f"{model.family.layer(plant.layer)}.{model.family.sites[3].linears[0]}"
    hook = model.module.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.inference_mode():
        model.module(input_ids=torch.tensor([[*tokens, *text]]), use_cache=False)
    hook.remove()
    return seen[0].reshape(len(tokens) + len(text), -1)[len(tokens) :].abs().amax(dim=1)


def test_the_search_finds_a_prefix_that_removes_the_sink(model: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    text = plain_ids[:48]
    before = largest_by_position(model, plant, (), text)
    assert before[0] > plant.massive
    assert before[0] > 20 * before.median()
    prefix, trace = PrefixSearch(model, text, SETTINGS).run()
    assert trace.steps[0].accepted
    assert prefix.length >= 1
    behind = largest_by_position(model, plant, prefix.token_ids, text)
    assert behind.max() < plant.massive / 2
    assert behind.max() < before[0] / 4


def test_an_absorber_removes_the_sink_from_every_text(model: TorchRunner, plain_ids: IntArray, plant: Any) -> None:
    for start in (0, 100, 200):
        text = plain_ids[start : start + 48]
        assert largest_by_position(model, plant, (), text)[0] > plant.massive
        assert largest_by_position(model, plant, plant.absorbers[:1], text).max() < plant.massive / 2
