"""Scales of the cache are the ranges that transformers' own cache shows, text tokens alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kv_cache import CacheObserver, choose_kv_scales, observe_cache
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.kv_scales import KV_PARTS, KvScales
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner

TOKENS = (7, 1, 100)


def largest(model: TorchRunner, rows: list[IntArray], skip: int) -> dict[str, np.ndarray]:
    """Return the largest magnitudes ``[layers, kv_heads]`` behind the first ``skip`` tokens, by transformers alone."""
    shape = (model.spec.num_layers, model.spec.num_kv_heads)
    found = {part: np.zeros(shape, np.float32) for part in KV_PARTS}
    for row in rows:
        with torch.inference_mode():
            cache = model.module(input_ids=torch.tensor([[*TOKENS, *row]]), use_cache=True).past_key_values
        for i, layer in enumerate(cache.layers):
            for part, states in (("key", layer.keys), ("value", layer.values)):
                found[part][i] = np.maximum(found[part][i], states[0, :, skip:].abs().amax((1, 2)).numpy())
    return found


def calibrated(model: TorchRunner, rows: list[IntArray], granularity: str, *, with_prefix: bool = False) -> KvScales:
    width = max(map(len, rows))
    ids, mask = np.full((len(rows), width), 65), np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    prefix = model.compute_prefix(TOKENS)
    return choose_kv_scales(
        observe_cache(model, prefix, ids, mask, granularity, batch_size=2), RangeEstimator("max"), granularity,
        prefix, model.lineage(prefix, "c"), int(mask.sum()), with_prefix=with_prefix,
    )  # fmt: skip


@pytest.fixture
def rows(plain_ids: IntArray) -> list[IntArray]:
    return [plain_ids[:20], plain_ids[30:43], plain_ids[50:70]]


def test_each_head_has_the_range_of_its_text_tokens(tiny_model: TorchRunner, rows: list[IntArray]) -> None:
    found, expected = calibrated(tiny_model, rows, "per-head"), largest(tiny_model, rows, len(TOKENS))
    np.testing.assert_allclose(found.keys, expected["key"] / np.float32(127), rtol=1e-4)
    np.testing.assert_allclose(found.values, expected["value"] / np.float32(127), rtol=1e-4)
    assert not found.with_prefix


def test_per_tensor_is_the_largest_head(tiny_model: TorchRunner, rows: list[IntArray]) -> None:
    found, expected = calibrated(tiny_model, rows, "per-tensor"), largest(tiny_model, rows, len(TOKENS))
    for scales, part in ((found.keys, "key"), (found.values, "value")):
        np.testing.assert_allclose(scales, np.tile(expected[part].max(1, keepdims=True) / 127, 2), rtol=1e-4)


@pytest.mark.parametrize("granularity", ["per-head", "per-tensor"])
def test_a_prefix_in_the_cache_is_covered(granularity: str, tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    rows = [plain_ids[:2]]
    found = calibrated(tiny_model, rows, granularity, with_prefix=True)
    everything, text = (largest(tiny_model, rows, skip)["key"] for skip in (0, len(TOKENS)))
    assert (everything > text).any(), "the prefix must matter"
    if granularity == "per-tensor":
        everything = np.tile(everything.max(1, keepdims=True), 2)
    np.testing.assert_allclose(found.keys, everything / np.float32(127), rtol=1e-4)
    assert found.with_prefix


@pytest.mark.parametrize("left", [0.0, 1e-8], ids=["zeros", "rounding noise"])
def test_a_head_that_carries_nothing_takes_the_largest_range_of_its_layer(
    tiny_model: TorchRunner, rows: list[IntArray], left: float
) -> None:
    module = tiny_model.module.model.layers[1].self_attn
    saved = module.v_proj.weight.clone(), module.k_proj.weight.clone()
    try:
        module.v_proj.weight[:16] *= left
        module.k_proj.weight[:] = 0
        found = calibrated(tiny_model, rows, "per-head")
    finally:
        module.v_proj.weight.copy_(saved[0])
        module.k_proj.weight.copy_(saved[1])
    assert found.values[1, 0] == found.values[1, 1] > 0
    assert found.keys[1].tolist() == [1, 1]


def test_what_is_not_finite_is_named() -> None:
    observer = CacheObserver("per-head", torch.ones(1, 3, dtype=torch.bool), 5)
    states = torch.ones(1, 2, 3, 4)
    states[0, 1, 2, 0] = float("inf")
    with pytest.raises(UsageError, match=r"layers\.4\.kv\.value, head 1, calibration batch 5"):
        observer(4, "value", states)


def test_padding_counts_for_nothing() -> None:
    states = torch.ones(2, 2, 3, 4)
    states[0, :, 2] = 50.0
    observer = CacheObserver("per-head", torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    assert observer(0, "key", states) is states
    assert [h.amax for h in observer.histograms[0, "key"]] == [1.0, 1.0]
    assert [h.counts.sum() for h in observer.histograms[0, "key"]] == [5 * 4] * 2
