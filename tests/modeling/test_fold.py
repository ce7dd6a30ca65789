"""A folded model is the same function with other weights, and export reads the very weights that torch runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import whole
from cushion_deploy.errors import UsageError
from cushion_deploy.families.folding import FoldedWeights, absorbers
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner

IDS = np.arange(3, 43, dtype=np.int64)[None]


@pytest.fixture(scope="module")
def smoothing(tiny_model: TorchRunner) -> Smoothing:
    """Return factors between 1/8 and 8 for every Site that can be smoothed."""
    rng = np.random.default_rng(5)
    factors = {
        site: np.exp2(rng.uniform(-3, 3, tiny_model.sites[site][0].in_features)).astype(np.float32)
        for site in absorbers(tiny_model.family, tiny_model.spec)
    }
    return Smoothing(factors, 0.5, tiny_model.spec.weights_digest)


def site_inputs(model: TorchRunner) -> dict[Site, np.ndarray]:
    """Return what enters every Site, ``[length, features]``."""
    found: dict[Site, np.ndarray] = {}
    with observed(model, lambda site, x: found.__setitem__(site, x[0].numpy())):
        model.logits(IDS, Prefix.empty(model.spec))
    return found


def test_everything_but_the_attention_output_and_the_head_can_be_smoothed(tiny_model: TorchRunner) -> None:
    assert {site.split(".", 2)[-1] for site in absorbers(tiny_model.family, tiny_model.spec)} == {
        "attn.qkv",
        "mlp.gate_up",
        "mlp.down",
    }


def test_the_output_stays_and_the_inputs_of_sites_are_divided(tiny_model: TorchRunner, smoothing: Smoothing) -> None:
    folded, none = tiny_model.folded(smoothing), Prefix.empty(tiny_model.spec)
    before, after = tiny_model.logits(IDS, none), folded.logits(IDS, none)
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    divided = site_inputs(folded)
    for site, x in site_inputs(tiny_model).items():
        expected = x / smoothing.factors[site] if site in smoothing.factors else x
        np.testing.assert_allclose(divided[site], expected, atol=2e-5 * np.abs(expected).max(), err_msg=site)


def test_only_what_a_factor_touches_is_replaced_and_it_comes_back(
    tiny_model: TorchRunner, smoothing: Smoothing
) -> None:
    none = Prefix.empty(tiny_model.spec)
    logits = tiny_model.logits(IDS, none)
    values = {name: p.clone() for name, p in tiny_model.module.named_parameters()}
    tiny_model.folded(smoothing).logits(IDS, none)
    for name, p in tiny_model.transformer.named_parameters():
        touched = (
            any(part in name for part in ("norm.weight", "q_proj", "k_proj", "v_proj", "mlp")) and "layers" in name
        )
        assert torch.equal(p, values[name]) is not touched, name
    np.testing.assert_array_equal(tiny_model.logits(IDS, none), logits)
    for name, p in tiny_model.module.named_parameters():
        assert torch.equal(p, values[name]), name


def test_export_reads_the_weights_that_torch_runs(tiny_model: TorchRunner, smoothing: Smoothing) -> None:
    folded = tiny_model.folded(smoothing)
    folded.logits(IDS, Prefix.empty(folded.spec))
    weights = FoldedWeights(tiny_model.weights, tiny_model.family, tiny_model.spec, smoothing)
    assert weights.names() == tiny_model.weights.names()
    for name, p in folded.module.named_parameters():
        if name in weights.names():
            np.testing.assert_array_equal(whole(weights, name), p.numpy(), err_msg=name)


def test_a_prefix_of_the_model_is_a_prefix_of_the_folded_model(
    planted_model: TorchRunner, smoothing_of: Callable[[TorchRunner], Smoothing]
) -> None:
    folded = planted_model.folded(smoothing_of(planted_model))
    ours, theirs = planted_model.compute_prefix((97, 5)), folded.compute_prefix((97, 5))
    assert theirs.model_digest == ours.model_digest
    np.testing.assert_allclose(theirs.keys, ours.keys, atol=1e-5 * np.abs(ours.keys).max())
    np.testing.assert_allclose(theirs.values, ours.values, atol=1e-5 * np.abs(ours.values).max())


def test_a_model_folded_in_inference_mode_takes_gradients(tiny_model: TorchRunner, smoothing: Smoothing) -> None:
    folded = tiny_model.folded(smoothing)
    with torch.inference_mode():
        folded.run(torch.from_numpy(IDS), KeysValues())
    assert not any(tensor.is_inference() for tensor in folded.module.state_dict().values())
    weight = next(p for n, p in folded.module.named_parameters() if n.endswith("down_proj.weight"))
    factor = torch.ones(1, requires_grad=True)
    (weight * factor).sum().backward()
    assert factor.grad is not None


@pytest.fixture(scope="module")
def smoothing_of() -> Callable[[TorchRunner], Smoothing]:
    """Return a maker of factors of 2 for the inputs of every attention."""

    def make(model: TorchRunner) -> Smoothing:
        factors = {
            site: np.full(model.sites[site][0].in_features, 2.0, dtype=np.float32)
            for site in absorbers(model.family, model.spec)
        }
        return Smoothing(factors, 0.5, model.spec.weights_digest)

    return make


def test_a_smoothing_of_another_model_or_of_other_sites_is_refused(
    tiny_model: TorchRunner, smoothing: Smoothing
) -> None:
    few = dict(list(smoothing.factors.items())[1:])
    for wrong in (replace(smoothing, model_digest="another"), replace(smoothing, factors=few)):
        with pytest.raises(UsageError, match="another model"):
            tiny_model.folded(wrong)
