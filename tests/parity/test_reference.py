"""The torch side of the ladder: what it calls the model is the model, and what it calls codes are the codes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from cushion_deploy.core.quantization import Quantization
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.parity.reference import GREEDY_TOKENS, PROMPT_TOKENS, torch_reference


def test_float_logits_are_those_behind_the_tokens_of_the_prefix(deployed) -> None:
    reference, tokens = deployed.reference, deployed.prefix.token_ids
    whole = torch.tensor([[*tokens, *reference.ids[0].tolist()]])
    with torch.inference_mode():
        expected = deployed.model.module(input_ids=whole, use_cache=False).logits[:, len(tokens) :].numpy()
    np.testing.assert_allclose(reference.float_logits, expected, atol=1e-4)


def test_codes_of_the_first_site_are_the_rounded_norm_of_the_embedding(deployed) -> None:
    state = {name: p.numpy().astype(np.float64) for name, p in deployed.model.module.named_parameters()}
    x = state["model.embed_tokens.weight"][deployed.reference.ids]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + deployed.model.spec.norm_eps)
    normed *= state["model.layers.0.input_layernorm.weight"]
    expected = np.clip(np.rint(normed / np.float32(deployed.scales.scales["layers.0.attn.qkv"])), -128, 127)
    codes = deployed.reference.codes["layers.0.attn.qkv"]
    assert codes.dtype == np.int8
    assert (codes == expected).mean() >= 0.999
    assert np.abs(codes - expected).max() <= 1


def test_codes_of_the_head_give_the_quantized_logits(deployed) -> None:
    weight = deployed.model.module.lm_head.weight.numpy()
    steps = np.abs(weight).max(1) / np.float32(127)
    sums = deployed.reference.codes["head"].astype(np.int64) @ np.rint(weight / steps[:, None]).astype(np.int64).T
    expected = sums * np.float64(deployed.scales.scales["head"]) * steps
    np.testing.assert_allclose(deployed.reference.quantized_logits, expected, atol=1e-3)


def test_every_site_of_the_graph_has_codes_in_its_order(deployed) -> None:
    assert list(deployed.reference.codes) == list(deployed.graph.sites)
    features = {site: codes.shape for site, codes in deployed.reference.codes.items()}
    assert features["layers.2.mlp.down"] == (1, 64, 96)
    assert features["head"] == (1, 64, 64)


def test_losses_and_continuation_are_those_of_the_quantized_model(deployed) -> None:
    d = deployed
    with simulated(d.model, d.scheme, d.scales):
        scores = torch.from_numpy(np.stack([d.model.logits(w[None], d.prefix)[0] for w in d.reference.windows]))
        ids = d.reference.prompt
        for _ in range(GREEDY_TOKENS):
            ids = np.concatenate([ids, d.model.logits(ids, d.prefix)[:, -1:].argmax(-1)], axis=1)
    expected = -torch.log_softmax(scores[:, :-1].double(), -1)
    chosen = torch.gather(expected, 2, torch.from_numpy(d.reference.windows[:, 1:, None]))[..., 0]
    np.testing.assert_allclose(d.reference.quantized_nll, chosen, atol=1e-4)
    assert d.reference.greedy == tuple(ids[0, PROMPT_TOKENS:].tolist())
    np.testing.assert_array_equal(d.reference.prompt, d.reference.ids[:, :PROMPT_TOKENS])
    assert len(d.reference.greedy) == GREEDY_TOKENS


def test_quantization_shows_and_the_model_is_left_as_it_was(deployed) -> None:
    before = {name: p.clone() for name, p in deployed.model.module.named_parameters()}
    seen: list[tuple[str, int, int]] = []
    ids = deployed.reference.ids[:, :40]
    d = deployed
    again = torch_reference(
        d.model,
        Quantization(d.prefix, d.scheme, d.scales),
        ids,
        d.reference.windows[:2],
        lambda task, done, n: seen.append((task, done, n)),
    )
    assert np.abs(again.quantized_logits - again.float_logits).max() > 0.01
    assert [row[1:] for row in seen if row[0] == "perplexity of fake-quant"] == [(1, 2), (2, 2)]
    assert again.quantized_nll.shape == (2, 63)
    for name, p in deployed.model.module.named_parameters():
        assert torch.equal(p, before[name]), name
    assert not any(module._forward_pre_hooks for module in deployed.model.module.modules())


def test_without_scales_for_a_site_there_is_no_reference(deployed) -> None:
    d = deployed
    left = {site: value for site, value in d.scales.scales.items() if site != "layers.1.attn.out"}
    with pytest.raises(UsageError, match=r"layers\.1\.attn\.out"):
        torch_reference(
            d.model,
            Quantization(d.prefix, d.scheme, dataclasses.replace(d.scales, scales=left)),
            d.reference.ids[:, :8],
            d.reference.windows[:1],
        )
