"""The inputs of the float twin's Sites are those of transformers, and the first one that is not is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.graph_form import GraphForm
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.export.write import export_graph
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.parity.blame import INPUT_DIFFERENCE, first_differing_input, twin_inputs
from cushion_deploy.parity.reference import float_inputs

A, B = Site("layers.0.attn.qkv"), Site("head")


@pytest.mark.parametrize("tied", [False, True])
def test_both_sides_show_what_enters_every_site(
    tied: bool, tiny_writer: Any, plain_ids: np.ndarray, tmp_path: Path
) -> None:
    folder = tiny_writer(tmp_path / "model", tie_word_embeddings=tied)
    model = load_folder(folder, resolve_source(str(folder)))
    prefix, ids = model.compute_prefix((7, 1)), plain_ids[None, :24]
    form, quantization = GraphForm(quantized=False), Quantization(prefix, QuantScheme())
    twin = export_graph(model.spec, model.weights, quantization, form, tmp_path, name="float")
    expected = float_inputs(model, prefix, ids)
    found = twin_inputs(twin, tuple(expected), ids)
    assert list(expected) == list(found) == list(model.sites)
    # The oracle: the modules before three kinds of Sites, run on prefix and text as one text without any cache.
    outputs: dict[str, torch.Tensor] = {}
    decoder = model.module.model
    for site, module in (
        ("layers.1.attn.qkv", decoder.layers[1].input_layernorm),
        ("layers.2.mlp.gate_up", decoder.layers[2].post_attention_layernorm),
        ("head", decoder.norm),
    ):
        module.register_forward_hook(lambda _, __, y, site=site: outputs.__setitem__(site, y))
    with torch.inference_mode():
        model.module(input_ids=torch.tensor([[7, 1, *ids[0].tolist()]]), use_cache=False)
    for site, output in outputs.items():
        np.testing.assert_allclose(expected[Site(site)], output[:, 2:].numpy(), atol=1e-4)
    for site, x in expected.items():
        assert found[site].shape == x.shape
        assert np.abs(found[site] - x).max() <= 1e-5 * np.abs(x).max(), site
    assert first_differing_input(expected, found) is None


@pytest.mark.parametrize(
    ("factor", "site"), [(0.9, None), (1.1, A), (-1.1, A), (np.nan, A)], ids=["below", "above", "below zero", "nan"]
)
def test_the_limit_is_a_share_of_the_largest_magnitude(factor: float, site: Site | None) -> None:
    x = np.array([[[1.0, -200.0, 3.0]]], dtype=np.float32)
    other = x.copy()
    other[0, 0, 0] += np.float32(factor * 200 * INPUT_DIFFERENCE)
    assert first_differing_input({A: x, B: x}, {A: other, B: other}) == site


def test_the_first_in_the_order_of_the_computation_is_named() -> None:
    x = np.ones((1, 2, 3), dtype=np.float32)
    assert first_differing_input({A: x, B: x}, {B: x * 2, A: x * 2}) == A
    assert first_differing_input({A: x, B: x}, {B: x * 2, A: x}) == B
