"""A simulated INT8 cache is attention over quantized keys and values, written out by hand in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.observe_cache import watched_cache
from cushion_deploy.modeling.past_key_values import KeysValues, keys_values
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_cache
from cushion_deploy.modeling.source import resolve_source

TOKENS = (7, 1, 100)


def made_up(model: TorchRunner, *, with_prefix: bool = False) -> KvScales:
    """Return scales of another size for each head."""
    shape = (model.spec.num_layers, model.spec.num_kv_heads)
    keys = (0.05 * (1 + np.arange(np.prod(shape)).reshape(shape) / 4)).astype(np.float32)
    parents = ("per-head", "max", Lineage(model.spec.weights_digest, "p", text="c"), 1)
    return KvScales(keys, (keys / 2).astype(np.float32), *parents, with_prefix=with_prefix)


def rounded(x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """Return what numpy makes of ``[kv_heads, n, head_dim]`` on a grid of a step a head."""
    step = step[:, None, None]
    return np.clip(np.rint(x / step), -128, 127).astype(np.float32) * step


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_writer: Any) -> TorchRunner:
    """Return a random model without rotation: one linear gives what enters the cache."""
    folder: Path = tiny_writer(
        tmp_path_factory.mktemp("gpt2"), None, "gpt2",
        n_embd=64, n_layer=2, n_head=4, n_inner=96, n_positions=128, tie_word_embeddings=True,
    )  # fmt: skip
    return load_folder(folder, resolve_source(str(folder)))


@torch.inference_mode()
def test_attention_reads_the_values_of_codes_of_old_and_new_tokens(gpt2: TorchRunner, plain_ids: IntArray) -> None:
    found: dict[str, np.ndarray] = {}
    block = gpt2.module.transformer.h[0].attn
    handles = [
        block.c_attn.register_forward_hook(lambda m, a, out: found.__setitem__("qkv", out[0].numpy().copy())),
        block.c_proj.register_forward_hook(lambda m, a, out: found.__setitem__("context", a[0][0].numpy().copy())),
    ]
    kv = made_up(gpt2)
    try:
        with quantized_cache(gpt2, kv):
            gpt2.run(torch.from_numpy(plain_ids[None, :12]), KeysValues())
    finally:
        for handle in handles:
            handle.remove()
    query, key, value = (x.reshape(12, 4, 16).transpose(1, 0, 2) for x in np.split(found["qkv"], 3, axis=-1))
    key, value = rounded(key, kv.keys[0]), rounded(value, kv.values[0])
    scores = query @ key.transpose(0, 2, 1) / 4
    scores[:, ~np.tri(12, dtype=bool)] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    context = (weights / weights.sum(-1, keepdims=True)) @ value
    np.testing.assert_allclose(found["context"], context.transpose(1, 0, 2).reshape(12, 64), atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("with_prefix", [False, True])
def test_what_is_stored_lies_on_the_grid_and_a_prefix_only_in_the_cache_does(
    with_prefix: bool, tiny_model: TorchRunner, plain_ids: IntArray
) -> None:
    prefix, kv = tiny_model.compute_prefix(TOKENS), made_up(tiny_model, with_prefix=with_prefix)
    ids = torch.from_numpy(plain_ids[None, :10])
    plain = tiny_model.run(ids, tiny_model.past(prefix), keep_cache=True).past_key_values.layers[0]
    codes: dict[str, np.ndarray] = {}
    with quantized_cache(tiny_model, kv, lambda site, c: codes.__setitem__(site, c.numpy().copy())):
        stored = tiny_model.run(ids, tiny_model.past(prefix), keep_cache=True).past_key_values.layers[0]
    for part, own, kept, floating, step in (
        ("key", prefix.keys, stored.keys, plain.keys, kv.keys[0]),
        ("value", prefix.values, stored.values, plain.values, kv.values[0]),
    ):
        first = rounded(own[0], step) if with_prefix else own[0]
        np.testing.assert_array_equal(kept[0, :, :3].numpy(), first)
        expected = rounded(floating[0, :, 3:].numpy(), step)
        # The first layer sees float inputs in both runs, so even its codes are the same.
        np.testing.assert_array_equal(kept[0, :, 3:].numpy(), expected)
        shown = codes[f"layers.0.kv.{part}"]
        assert shown.dtype == np.int8
        np.testing.assert_array_equal(shown[0].transpose(1, 0, 2) * step[:, None, None], expected)
    assert list(codes) == [f"layers.{i}.kv.{part}" for i in range(3) for part in ("key", "value")]


@torch.inference_mode()
@pytest.mark.parametrize("with_prefix", [False, True])
def test_decoding_through_the_cache_gives_the_logits_of_one_pass(
    with_prefix: bool, tiny_model: TorchRunner, plain_ids: IntArray
) -> None:
    prefix, kv = tiny_model.compute_prefix(TOKENS), made_up(tiny_model, with_prefix=with_prefix)
    ids = torch.from_numpy(plain_ids[None, :10])
    plain = tiny_model.run(ids, tiny_model.past(prefix)).logits
    with quantized_cache(tiny_model, kv):
        whole = tiny_model.run(ids, tiny_model.past(prefix)).logits
        past, steps = tiny_model.past(prefix), []
        for i in range(10):
            out = tiny_model.run(ids[:, i : i + 1], past, keep_cache=True)
            past = keys_values(out.past_key_values)
            steps.append(out.logits)
    assert float((whole - plain).abs().max()) > 1e-2, "the cache must matter"
    # A code that lies at a tie may fall to either side: another batch shape sums in another order.
    assert float((torch.cat(steps, 1) - whole).abs().median()) <= 1e-5


@torch.inference_mode()
def test_without_a_cache_of_the_caller_there_is_one_all_the_same(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    ids, kv = torch.from_numpy(plain_ids[None, :10]), made_up(tiny_model)
    with quantized_cache(tiny_model, kv):
        given = tiny_model.run(ids, KeysValues()).logits
        own = tiny_model.module(input_ids=ids, use_cache=False).logits
    assert torch.equal(given, own)


@torch.inference_mode()
def test_watching_changes_nothing_and_ends(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    ids, seen = torch.from_numpy(plain_ids[None, :10]), []
    plain = tiny_model.run(ids, KeysValues(), keep_cache=True)
    with watched_cache(tiny_model, lambda layer, part, states: seen.append((layer, part, states)) or states):
        watched = tiny_model.run(ids, KeysValues())
    assert torch.equal(plain.logits, watched.logits)
    for layer, part, states in seen:
        held = plain.past_key_values.layers[layer]
        assert torch.equal(states, held.keys if part == "key" else held.values)
    assert len(seen) == 6
    tiny_model.run(ids, KeysValues())
    assert len(seen) == 6
