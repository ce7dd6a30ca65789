"""Smoothing factors are those of the paper's formula over the channels of real text, and tame a large channel."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cushion_deploy.calib.smooth import channel_maxima, choose_factors, choose_smoothing
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import SmoothQuant


def text(rows: int, seed: int = 0) -> np.ndarray:
    """Return int64 ``[rows, 24]`` ordinary tokens."""
    return np.random.default_rng(seed).integers(3, 300, size=(rows, 24))


def brute(model: TorchRunner, ids: list[int], skip: int) -> dict[str, np.ndarray]:
    """Return the largest magnitude of each channel of every Site, without cache or hooks of ours."""
    found: dict[str, np.ndarray] = {}
    handles = [
        linears[0].register_forward_hook(
            lambda _, args, __, site=site: found.__setitem__(site, args[0][0, skip:].abs().amax(0).numpy())
        )
        for site, linears in model.sites.items()
    ]
    with torch.inference_mode():
        model.module(input_ids=torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_maxima_are_those_of_the_text_alone(planted_model: TorchRunner) -> None:
    ids = text(3)
    mask = np.ones_like(ids)
    mask[1, 10:] = 0
    ids[1, 10:] = 0
    prefix = planted_model.compute_prefix((97,))
    got = channel_maxima(planted_model, prefix, ids, mask, batch=2)
    lengths = (24, 10, 24)
    rows = [brute(planted_model, [97, *ids[i, :n]], skip=1) for i, n in enumerate(lengths)]
    for site, value in got.items():
        expected = np.max([row[site] for row in rows], axis=0)
        np.testing.assert_allclose(value, expected, rtol=1e-3, atol=1e-4 * expected.max(), err_msg=site)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_factors_follow_the_formula(tiny_model: TorchRunner, alpha: float) -> None:
    ids = text(2)
    maxima = channel_maxima(tiny_model, Prefix.empty(tiny_model.spec), ids, np.ones_like(ids))
    smoothing = choose_factors(tiny_model, maxima, alpha)
    assert HEAD_SITE not in smoothing.factors
    for site, factor in smoothing.factors.items():
        weight = np.concatenate([linear.weight.numpy() for linear in tiny_model.sites[site]])
        size = np.maximum(maxima[site], 0.02 * np.quantile(maxima[site], 0.9))
        expected = size**alpha / np.abs(weight).max(axis=0) ** (1 - alpha)
        np.testing.assert_allclose(factor, expected, rtol=1e-5)


@pytest.mark.parametrize("limit", [1.0, 1.5, 4.0])
def test_a_limit_divides_down_the_largest_channels_alone(tiny_model: TorchRunner, limit: float) -> None:
    ids, none = text(2), Prefix.empty(tiny_model.spec)
    maxima = dict(channel_maxima(tiny_model, none, ids, np.ones_like(ids)))
    site = Site("layers.1.mlp.down")
    maxima[site] = maxima[site].copy()
    maxima[site][[5, 40]] *= 100
    free, limited = (choose_factors(tiny_model, maxima, 0.5, limit).factors[site] for limit in (None, limit))
    before, after = maxima[site] / free, maxima[site] / limited
    bound = limit * np.quantile(before, 0.9)
    np.testing.assert_allclose(after, np.minimum(before, bound), rtol=1e-5)
    assert (before[[5, 40]] > bound).all()


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("dead", [0.05, 0.95])
def test_channels_that_were_not_seen_change_nothing_for_the_others_and_keep_their_headroom(
    tiny_model: TorchRunner, limit: float | None, dead: float
) -> None:
    site = Site("layers.1.mlp.down")
    maxima = {s: np.ones(linears[0].in_features, np.float32) for s, linears in tiny_model.sites.items()}
    rng = np.random.default_rng(1)
    maxima[site] = rng.uniform(0.5, 2.0, len(maxima[site])).astype(np.float32)
    silent = rng.random(len(maxima[site])) < dead
    maxima[site][silent] = 0
    factor = choose_factors(tiny_model, maxima, 0.5, limit).factors[site]
    assert np.isfinite(factor).all()
    smoothed = maxima[site][~silent] / factor[~silent]
    weight = np.concatenate([linear.weight.numpy() for linear in tiny_model.sites[site]])
    plain = maxima[site] ** 0.5 / np.abs(weight).max(axis=0) ** 0.5
    before = maxima[site][~silent] / plain[~silent]
    bound = np.inf if limit is None else limit * np.quantile(before, 0.9)
    np.testing.assert_allclose(smoothed, np.minimum(before, bound), rtol=1e-4)
    # A silent channel that fires as hard as the others is at most some times larger than they are, not thousands.
    fired = 1.0 / factor[silent]
    assert (fired < 20 * smoothed.max()).all()


def test_with_alpha_one_all_channels_are_equally_large(tiny_model: TorchRunner) -> None:
    ids, none = text(2), Prefix.empty(tiny_model.spec)
    maxima = channel_maxima(tiny_model, none, ids, np.ones_like(ids))
    folded = tiny_model.folded(choose_factors(tiny_model, maxima, 1.0))
    after = channel_maxima(folded, none, ids, np.ones_like(ids))
    for site in choose_factors(tiny_model, maxima, 1.0).factors:
        weight = np.concatenate([linear.weight.numpy() for linear in tiny_model.sites[site]])
        assert weight.shape[1] == len(after[site])
        loud = maxima[site] > 0.02 * np.quantile(maxima[site], 0.9)
        np.testing.assert_allclose(after[site][loud], 1.0, rtol=1e-3, err_msg=site)


def test_factors_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UntrustedArtifact, match=r"layers\.0\.mlp\.down"):
        Smoothing({Site("layers.0.mlp.down"): np.array([1, np.nan], np.float32)}, 0.5, "m")


def test_a_rotation_flattens_the_spike_of_one_channel(tiny_model: TorchRunner) -> None:
    ids, none = text(2), Prefix.empty(tiny_model.spec)
    found = choose_smoothing(
        tiny_model, none, ids, np.ones_like(ids), SmoothQuant(alpha=None, rotate_down=16, rotate_out=0, rotate_in=0)
    )
    assert not found.factors
    assert set(found.rotations.values()) == {16}
    site = Site("layers.0.mlp.down")
    folded, inputs = tiny_model.folded(found), []
    spike = torch.zeros(1, 1, tiny_model.sites[site][0].in_features)
    spike[..., 5] = 64.0
    with observed(folded, lambda _, x: inputs.append(x), {site: tiny_model.sites[site]}):
        folded.module  # noqa: B018 (folds)
        tiny_model.sites[site][0](spike)
    assert inputs[0].abs().amax() == 16.0  # 64 / sqrt(16)
    assert int((inputs[0] != 0).sum()) == 16


def test_a_recipe_without_factors_and_rotations_smooths_nothing(tiny_model: TorchRunner) -> None:
    ids, none = text(1), Prefix.empty(tiny_model.spec)
    config = SmoothQuant(alpha=None, rotate_down=0, rotate_out=0, rotate_in=0)
    assert not config.enabled
    assert choose_smoothing(tiny_model, none, ids, np.ones_like(ids), config).digest == ""
