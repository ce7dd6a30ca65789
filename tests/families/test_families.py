"""A family's description against what transformers builds for it."""

from __future__ import annotations

import pytest
from torch import nn

from cushion_deploy.errors import UsageError
from cushion_deploy.families import FAMILIES, family_for_model_type, get_family
from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.types import HEAD_SITE


def test_every_linear_of_the_model_belongs_to_exactly_one_site(tiny_model: LoadedModel) -> None:
    claimed = [p for paths in tiny_model.family.linears(tiny_model.spec, head=True).values() for p in paths]
    actual = [name for name, module in tiny_model.module.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(claimed) == sorted(actual)


def test_sites_come_in_the_order_of_the_computation(tiny_model: LoadedModel) -> None:
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
        for name, module in tiny_model.module.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        tiny_model.module(**{k: v for k, v in tiny_model.module.dummy_inputs.items() if k == "input_ids"})
    finally:
        for handle in handles:
            handle.remove()
    first = [paths[0] for paths in tiny_model.family.linears(tiny_model.spec, head=True).values()]
    assert [name for name in called if name in first] == first


def test_the_head_is_left_out_on_request(tiny_model: LoadedModel) -> None:
    with_head = tiny_model.family.linears(tiny_model.spec, head=True)
    without = tiny_model.family.linears(tiny_model.spec, head=False)
    assert set(with_head) - set(without) == {HEAD_SITE}


def test_the_other_paths_lead_to_modules_of_their_kind(tiny_model: LoadedModel) -> None:
    family, module = tiny_model.family, tiny_model.module
    assert isinstance(module.get_submodule(family.embedding), nn.Embedding)
    assert len(module.get_submodule(family.layers)) == tiny_model.spec.num_layers
    for path in (family.final_norm, *(f"{family.layer(1)}.{p}" for p in (family.attention_norm, family.mlp_norm))):
        assert "Norm" in type(module.get_submodule(path)).__name__


def test_a_family_is_found_by_name_and_by_every_model_type() -> None:
    for name, family in FAMILIES.items():
        assert get_family(name) is family
        assert all(family_for_model_type(t) is family for t in family.model_types)


@pytest.mark.parametrize("model_type", ["mamba", "", None])
def test_an_unknown_model_type_is_answered_with_the_supported_ones(model_type: str | None) -> None:
    with pytest.raises(UsageError, match=f"'{model_type}' is not supported") as e:
        family_for_model_type(model_type)
    assert all(t in e.value.hint for f in FAMILIES.values() for t in f.model_types)


def test_a_rule_is_found_by_its_kind() -> None:
    assert FAMILIES["llama"].rule("mlp.down").linears == ("mlp.down_proj",)
