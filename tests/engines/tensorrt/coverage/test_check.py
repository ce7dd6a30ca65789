"""The linears of the parsed network, held against the Sites of the graph."""

from __future__ import annotations

import pytest

from cushion_deploy.core.sites import Site
from cushion_deploy.engines.tensorrt.coverage.check import graph_linears
from cushion_deploy.errors import CheckFailed


def test_a_site_without_exactly_one_product_is_refused() -> None:
    sites = {Site("layers.0.attn.qkv"): 3, Site("layers.0.mlp.down"): 1}
    first = {"node": "a", "weight": "layers.0.attn.qkv.weight_codes", "broken": ""}
    second = {"node": "b", "weight": "layers.0.mlp.down.weight", "broken": ""}
    embedding = {"node": "c", "weight": "model.embed_tokens.weight", "broken": ""}
    found = graph_linears([first, second, embedding], sites)
    assert [(x.node, x.site, x.linears) for x in found] == [
        ("a", "layers.0.attn.qkv", 3),
        ("b", "layers.0.mlp.down", 1),
    ]
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.down: none"):
        graph_linears([first], sites)
    with pytest.raises(CheckFailed, match=r"layers\.0\.mlp\.down: b, d"):
        graph_linears([first, second, {**second, "node": "d"}], sites)
