"""A family's description against what transformers builds for it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from cushion_deploy.calib.smooth import choose_rotations
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.families import FAMILIES, family_for_model_type, get_family
from cushion_deploy.families.folding import absorbers
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import SmoothQuant

LoadVariant = Callable[[str], TorchRunner]


def test_every_linear_of_the_model_belongs_to_exactly_one_site(variant: str, load_variant: LoadVariant) -> None:
    model = load_variant(variant)
    claimed = [p for paths in model.family.linears(model.spec, head=True).values() for p in paths]
    actual = {name for name, module in model.module.named_modules() if isinstance(module, nn.Linear)}
    assert sorted(claimed) == sorted(actual - {model.family.embedding_in, model.family.embedding_out})


def test_sites_come_in_the_order_of_the_computation(variant: str, load_variant: LoadVariant) -> None:
    model, called = load_variant(variant), []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, module in model.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        model.module(input_ids=torch.tensor([[3, 4, 5]]))
    finally:
        for handle in handles:
            handle.remove()
    first = [paths[0] for paths in model.family.linears(model.spec, head=True).values()]
    assert [name for name in called if name in first] == first


def test_the_head_is_left_out_on_request(variant: str, load_variant: LoadVariant) -> None:
    model = load_variant(variant)
    with_head, without = (model.family.linears(model.spec, head=head) for head in (True, False))
    assert set(with_head) - set(without) == {HEAD_SITE}


def test_the_other_paths_lead_to_modules_of_their_kind(variant: str, load_variant: LoadVariant) -> None:
    model = load_variant(variant)
    family, module = model.family, model.module
    assert isinstance(module.get_submodule(family.embedding), nn.Embedding)
    assert len(module.get_submodule(family.layers)) == model.spec.num_layers
    inside = (family.attention_norm, family.mlp_norm, family.attention_post_norm, family.mlp_post_norm)
    paths = [family.embedding_norm, *(f"{family.layer(1)}.{path}" for path in inside if path)]
    for path in filter(None, paths):
        assert "Norm" in type(module.get_submodule(path)).__name__
    norms = {name for name, found in module.named_modules() if "Norm" in type(found).__name__}
    known = {family.final_norm, *filter(None, paths)}
    known |= {f"{family.layer(1)}.{path}" for path in (family.query_norm, family.key_norm) if path}
    assert {name for name in norms if f"{family.layers}." not in name or f"{family.layer(1)}." in name} <= known


def test_folding_a_smoothing_changes_no_output(variant: str, load_variant: LoadVariant) -> None:
    model = load_variant(variant)
    rng = np.random.default_rng(0)
    wanted = absorbers(model.family, model.spec)
    widths = {site: model.sites[site][0].in_features for site in wanted}
    factors = {site: np.exp(rng.normal(size=widths[site])).astype(np.float32) for site in wanted}
    folded = model.folded(Smoothing(factors, 0.5, model.spec.weights_digest))
    ids = rng.integers(3, 300, (1, 24))
    expected = model.logits(ids, Prefix.empty(model.spec))
    found = folded.logits(ids, Prefix.empty(model.spec))
    assert len(wanted) >= model.spec.num_layers
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    for site in wanted:
        assert not torch.equal(next(folded.weights_of(site)), next(model.weights_of(site)))


def test_rotations_change_no_output_and_turn_the_inputs_of_their_sites(variant: str, load_variant: LoadVariant) -> None:
    model, none = load_variant(variant), Prefix.empty(load_variant(variant).spec)
    rotations = choose_rotations(model, SmoothQuant(rotate_down=16, rotate_out=8, rotate_in=4))
    assert set(rotations) == {site for site in model.sites if site != "head"}
    assert set(rotations.values()) == {16, 8, 4}
    folded = model.folded(Smoothing({}, None, model.spec.weights_digest, rotations))
    ids = np.random.default_rng(0).integers(3, 300, (1, 24))
    before, after = site_inputs(model, ids), site_inputs(folded, ids)
    for site, x in before.items():
        block = rotations.get(site, 1)
        matrix = kronecker_power(block)
        expected = (x.reshape(-1, x.shape[-1] // block, block) @ matrix).reshape(x.shape)
        np.testing.assert_allclose(after[site], expected, atol=1e-4 * np.abs(expected).max(), err_msg=site)
    expected = model.logits(ids, none)
    np.testing.assert_allclose(folded.logits(ids, none), expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(model.logits(ids, none), expected)


def site_inputs(model: TorchRunner, ids: np.ndarray) -> dict[Site, np.ndarray]:
    """Return what enters every Site, ``[length, features]``."""
    found: dict[Site, np.ndarray] = {}
    with observed(model, lambda site, x: found.__setitem__(site, x[0].numpy())):
        model.logits(ids, Prefix.empty(model.spec))
    return found


def kronecker_power(order: int) -> np.ndarray:
    """Return the Hadamard matrix of Sylvester's construction, divided by its norm."""
    found = np.ones((1, 1))
    while len(found) < order:
        found = np.kron(np.array([[1, 1], [1, -1]]), found)
    return found / np.sqrt(order)


def test_a_family_is_found_by_name_and_by_every_model_type() -> None:
    for name, family in FAMILIES.items():
        assert get_family(name) is family
        assert all(family_for_model_type(t) is family for t in family.model_types)


@pytest.mark.parametrize("model_type", ["mamba", "", None])
def test_an_unknown_model_type_is_answered_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(UsageError, match=f"'{model_type}' is not supported") as e:
        family_for_model_type(model_type)
    assert all(t in e.value.hint for f in FAMILIES.values() for t in f.model_types)


@pytest.mark.parametrize(
    ("model_type", "missing"),
    [
        ("qwen3_moe", "experts"),
        ("gpt_oss", "learned sinks"),
        ("qwen3_5_text", "linear attention"),
        ("gemma4_text", "embeddings for every layer"),
        ("deepseek_v3", "latent attention"),
        ("mamba2", "state-space"),
    ],
)
def test_what_a_known_architecture_has_that_no_family_describes_is_named(model_type: str, missing: str) -> None:
    assert model_type in CONFIG_MAPPING
    with pytest.raises(UsageError, match=missing):
        family_for_model_type(model_type)


def test_a_rule_is_found_by_its_kind() -> None:
    assert FAMILIES["llama"].rule("mlp.down").linears == ("mlp.down_proj",)
