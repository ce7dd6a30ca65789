"""A model whose layers do not fit on the device computes, layer by layer, exactly what the resident one computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.kv_cache import observe_cache
from cushion_deploy.calib.smooth import channel_maxima, choose_factors
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sample import sample_text
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.source import resolve_source
from cushion_deploy.prefix.search import PrefixSearch
from cushion_deploy.prefix.tune import PrefixTuning
from cushion_deploy.recipe import Compute, Search, Tuning

LoadVariant = Callable[[str], TorchRunner]


@pytest.fixture
def streamed(variant: str, load_variant: LoadVariant) -> TorchRunner:
    """Return the model with none of its layers kept in memory."""
    folder = load_variant(variant).folder
    return load_folder(folder, resolve_source(str(folder)), compute=Compute(device="cpu", memory=0))


@pytest.fixture
def padded() -> tuple[IntArray, IntArray]:
    """Return five windows, the last of them shorter: two full batches of two and one with padding."""
    ids = np.random.default_rng(0).integers(3, 300, (5, 12))
    mask = np.ones_like(ids)
    mask[4, 7:] = 0
    return ids, mask


def test_every_stage_finds_the_same_in_a_streamed_model(
    variant: str, load_variant: LoadVariant, streamed: TorchRunner, padded: tuple[IntArray, IntArray]
) -> None:
    resident = load_variant(variant)
    assert streamed.placed.streamed_layers == resident.spec.num_layers
    assert all(p.is_meta for p in streamed.layers.parameters())
    found = []
    for model in (resident, streamed):
        prefix = model.compute_prefix((7, 8))
        maxima = channel_maxima(model, prefix, *padded, batch=2)
        folded = model.folded(choose_factors(model, maxima, 0.5))
        histograms = observe_sites(folded, prefix, *padded, batch_size=2)
        scales = choose_scales(histograms, RangeEstimator("max"), folded.lineage(prefix), 1)
        with simulated(folded, QuantScheme(), scales):
            losses = folded.token_nll(padded[0], prefix)
        cache = observe_cache(model, prefix, *padded, "per-head", batch_size=2)
        found.append((prefix, maxima, histograms, losses, model.token_nll(padded[0], Prefix.empty(model.spec)), cache))
    one, other = found
    np.testing.assert_array_equal(one[0].keys, other[0].keys)
    assert one[1].keys() == other[1].keys()
    for site, value in one[1].items():
        np.testing.assert_array_equal(value, other[1][site], err_msg=site)
        assert one[2][site].amax == other[2][site].amax
        np.testing.assert_array_equal(one[2][site].counts, other[2][site].counts, err_msg=site)
    np.testing.assert_array_equal(one[3], other[3])
    np.testing.assert_array_equal(one[4], other[4])
    for place, histogram in one[5].items():
        assert [h.amax for h in histogram] == [h.amax for h in other[5][place]]


def test_each_layer_is_read_once_in_a_sweep(
    streamed: TorchRunner, padded: tuple[IntArray, IntArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    tensor = streamed.weights.tensor
    monkeypatch.setattr(streamed.weights, "tensor", lambda name, *rest: read.append(name) or tensor(name, *rest))
    streamed.token_nll(padded[0], Prefix.empty(streamed.spec))
    layers = {name for name in streamed.weights.names() if name.startswith(f"{streamed.family.layers}.")}
    assert sorted(name for name in read if name in layers) == sorted(layers)


def test_as_many_layers_stay_as_the_memory_allows(planted_folder: Path) -> None:
    source = resolve_source(str(planted_folder))
    whole = sum(p.numel() * 4 for p in load_folder(planted_folder, source).module.parameters()) + 1000
    streamed = [
        load_folder(
            planted_folder, source, compute=Compute(device="cpu", memory=share * whole / 2**30)
        ).placed.streamed_layers
        for share in (1.0, 0.99, 0.0)
    ]
    assert streamed == [0, 2, 3]


def test_search_and_tuning_find_the_same_in_a_streamed_model(planted_folder: Path, plain_ids: IntArray) -> None:
    source, windows = resolve_source(str(planted_folder)), plain_ids[:128].reshape(4, 32)
    settings = Search(text_tokens=64, random_candidates=8, screen_candidates=8, gradient_candidates=8, audit_tokens=4)
    results = []
    for memory in (None, 0.0):
        model = load_folder(planted_folder, source, compute=Compute(device="cpu", memory=memory))
        prefix, trace = PrefixSearch(model, plain_ids, settings).run()
        histograms = observe_sites(model, prefix, windows, np.ones_like(windows))
        scales = choose_scales(histograms, RangeEstimator("max"), model.lineage(prefix), 1)
        start = Quantization(prefix, QuantScheme(), scales)
        config = Tuning(epochs=1, batch=3, microbatch=3)
        tuned, _, states = PrefixTuning(model, start, windows[:3], windows[3:], config).run()
        results.append((prefix, trace.steps, sample_text(model, 3), tuned, states.states))
    one, other = results
    assert one[0].token_ids == other[0].token_ids
    assert one[1] == other[1]
    assert one[2] == other[2]
    np.testing.assert_array_equal(one[3].keys, other[3].keys)
    assert one[4] == other[4]
