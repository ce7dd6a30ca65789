"""Every scheme in torch computes what numpy computes from the definition, one grid and one group at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme, parse_scheme
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.families.folding import absorbers
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import (
    dynamic_grid,
    quantize_asymmetric_codes,
    quantized_sites,
    quantized_weights,
    simulated,
)

F = np.float32
TINY = np.finfo(F).tiny
Array = np.ndarray[Any, Any]


def grid_by_definition(x: Array, bits: int, symmetric: bool) -> tuple[np.float32, np.float32]:
    """Return scale and zero point of the values that share them."""
    if symmetric:
        scale = F(np.abs(x).max()) / F(2 ** (bits - 1) - 1)
        return (scale if scale >= TINY else F(1)), F(0)
    low, high = F(min(x.min(), 0)), F(max(x.max(), 0))
    scale = F(F(high - low) / F(2**bits - 1))
    scale = scale if scale >= TINY else F(1)
    return scale, F(np.rint(-low / scale))


def codes_by_definition(x: Array, scale: Any, zero: Any, bits: int, symmetric: bool) -> Array:
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    return np.clip(np.rint(x / F(scale)) + F(zero), *ends)


def weight_by_definition(weight: Array, bits: int, group: int) -> Array:
    out, limit = np.empty_like(weight), 2 ** (bits - 1) - 1
    size = group or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        part = weight[:, start : start + size]
        step = np.abs(part).max(axis=1, keepdims=True) / F(limit)
        out[:, start : start + size] = np.clip(np.rint(part / step), -limit - 1, limit) * step
    return out


def activations_by_definition(x: Array, scheme: QuantScheme, static: tuple[float, int]) -> tuple[Array, Array]:
    """Return codes and values of ``x`` [batch, length, features]."""
    bits, symmetric = scheme.activation_bits, scheme.symmetric
    codes, values = np.empty_like(x), np.empty_like(x)
    for row in range(x.shape[0]):
        tokens = [slice(t, t + 1) for t in range(x.shape[1])] if scheme.activations == "per-token" else [slice(None)]
        for token in tokens:
            part = x[row, token]
            scale, zero = static if scheme.activations == "static" else grid_by_definition(part, bits, symmetric)
            codes[row, token] = codes_by_definition(part, scale, zero, bits, symmetric)
            values[row, token] = (codes[row, token] - F(zero)) * F(scale)
    return codes, values


class Watch:
    """What enters every linear before anything replaces it, and what comes out."""

    def __init__(self, model: TorchRunner) -> None:
        self.inputs: dict[nn.Module, Array] = {}
        self.outputs: dict[nn.Module, Array] = {}
        self.handles: list[Any] = []
        for linear in (linear for group in model.sites.values() for linear in group):
            self.handles += [linear.register_forward_pre_hook(self.before), linear.register_forward_hook(self.after)]

    def before(self, m: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.inputs[m] = args[0].numpy().copy()

    def after(self, m: nn.Module, _: Any, out: Tensor) -> None:
        self.outputs[m] = out.numpy().copy()


@pytest.fixture
def watch(tiny_model: TorchRunner) -> Iterator[Watch]:
    # Hooks run in the order of their registration: these stand before any that simulate.
    found = Watch(tiny_model)
    yield found
    for handle in found.handles:
        handle.remove()


@pytest.fixture
def ids(plain_ids: IntArray) -> Tensor:
    return torch.from_numpy(plain_ids[:24].reshape(2, 12))


def static_scales(model: TorchRunner, scheme: QuantScheme) -> ActivationScales:
    """Return made-up scales of the scheme's kind, others for each Site, narrow enough to saturate some codes."""
    step = 2.0 / 2 ** (scheme.activation_bits - 1)
    scales = {site: float(F(step * (1 + i / 8))) for i, site in enumerate(model.sites)}
    zeros = {} if scheme.symmetric else {site: (i * 5 + 3) % 2**scheme.activation_bits for i, site in enumerate(scales)}
    digest = model.spec.weights_digest
    return ActivationScales(
        scales, "max", Lineage(digest, "p", text="c"), 1, zero_points=zeros, bits=scheme.activation_bits
    )


NAMES = [
    f"{bits}-{granularity}{asymmetric}{group}"
    for bits, group in (("w8a8", ""), ("w8a8", "-g40"), ("w6a6", "-g64"), ("w4a4", "-g7"), ("w4a8", "-g1000"))
    for granularity in ("static", "dynamic", "per-token")
    for asymmetric in ("", "-asym")
]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_every_linear_computes_with_codes_and_weights_of_the_definition(
    name: str, tiny_model: TorchRunner, ids: Tensor, watch: Watch
) -> None:
    scheme = parse_scheme(name)
    scales = static_scales(tiny_model, scheme)
    original = {m: m.weight.numpy().copy() for group in tiny_model.sites.values() for m in group}
    found: dict[Site, Tensor] = {}
    needed = scales if scheme.activations == "static" else None
    with simulated(tiny_model, scheme, needed, lambda site, c: found.__setitem__(site, c.clone())):
        tiny_model.module(input_ids=ids)
    assert list(found) == list(tiny_model.sites)
    for site, linears in tiny_model.sites.items():
        static = (scales.scales[site], scales.zero_points.get(site, 0))
        codes, values = activations_by_definition(watch.inputs[linears[0]], scheme, static)
        assert found[site].dtype == (torch.int8 if scheme.symmetric else torch.uint8)
        np.testing.assert_array_equal(found[site].numpy(), codes)
        for linear in linears:
            weight = weight_by_definition(original[linear], scheme.weight_bits, scheme.weight_group)
            np.testing.assert_allclose(watch.outputs[linear], values @ weight.T, rtol=1e-4, atol=2e-4)


@settings(deadline=None, derandomize=True)
@given(
    hnp.arrays(F, (2, 3, 4), elements=st.floats(-1e6, 1e6, width=32)),
    st.sampled_from([parse_scheme(n) for n in NAMES if "static" not in n]),
)
def test_dynamic_grids_are_those_of_the_definition(x: Array, scheme: QuantScheme) -> None:
    scale, zero = dynamic_grid(torch.from_numpy(x.copy()), scheme)
    per_token = scheme.activations == "per-token"
    assert scale.shape == ((2, 3, 1) if per_token else (2, 1, 1))
    assert (zero is None) is scheme.symmetric
    for row in range(2):
        for token in range(3 if per_token else 1):
            part = x[row, token] if per_token else x[row]
            expected = grid_by_definition(part, scheme.activation_bits, scheme.symmetric)
            assert scale[row, token, 0].item() == expected[0]
            assert (0.0 if zero is None else zero[row, token, 0].item()) == expected[1]


@settings(deadline=None, derandomize=True)
@given(
    hnp.arrays(F, (3, 5), elements=st.floats(-1e4, 1e4, width=32)),
    st.floats(2.0**-8, 2.0**8, width=32),
    st.integers(0, 15),
)
def test_asymmetric_codes_are_those_of_the_definition(x: Array, scale: float, zero: int) -> None:
    codes = quantize_asymmetric_codes(torch.from_numpy(x.copy()), torch.tensor(scale), torch.tensor(float(zero)), 4)
    np.testing.assert_array_equal(codes.numpy(), codes_by_definition(x, scale, zero, 4, False))


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-per-token-asym", "w8a8-dynamic-asym", "w4a4-per-token"])
def test_nothing_but_zeros_becomes_zero_and_not_a_number_stays_visible(name: str) -> None:
    scheme, x = parse_scheme(name), torch.zeros(2, 3, 4)
    scale, zero = dynamic_grid(x, scheme)
    assert torch.equal(scale, torch.ones_like(scale))
    assert zero is None or not zero.any()
    x[1, 1, 1] = torch.nan
    scale, _ = dynamic_grid(x, scheme)
    assert scale[1].isnan().any()
    assert not scale[0].isnan().any()


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-dynamic-asym"])
@pytest.mark.parametrize("value", [1e30, -1e30, torch.inf, torch.nan])
def test_padding_enters_no_dynamic_range(name: str, value: float) -> None:
    scheme = parse_scheme(name)
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3))
    text = torch.tensor([[True] * 5, [False, False, True, True, True]])
    padded = x.clone()
    padded[1, :2] = value
    scale, zero = dynamic_grid(padded, scheme, text)
    for row in range(2):
        expected = grid_by_definition(x[row][text[row]].numpy(), 8, scheme.symmetric)
        assert (scale[row].item(), 0.0 if zero is None else zero[row].item()) == expected


def codes_of(model: TorchRunner, scheme: QuantScheme, prefix: Prefix, rows: Tensor, mask: Tensor | None) -> Any:
    found: dict[Site, Array] = {}
    with simulated(model, scheme, None, lambda site, c: found.__setitem__(site, c.numpy().astype(int))):
        model.run(rows, model.past(prefix), mask)
    return found


def agree(one: Array, other: Array) -> bool:
    """Whether codes are the same but for what another batch shape rounds elsewhere, one code at most."""
    return bool(np.abs(one - other).max() <= 1 and (one != other).mean() < 0.01)


@pytest.mark.parametrize("name", ["w8a8-dynamic", "w8a8-dynamic-asym", "w8a8-per-token-asym"])
@pytest.mark.parametrize("tokens", [(), (65,)])
@pytest.mark.parametrize("left", [True, False])
@torch.inference_mode()
def test_a_row_has_the_same_codes_alone_and_padded_in_a_batch_with_a_loud_row(
    name: str, tokens: tuple[int, ...], left: bool, planted_model: TorchRunner, plain_ids: IntArray
) -> None:
    scheme, prefix = parse_scheme(name), planted_model.compute_prefix(tokens)
    quiet, loud = plain_ids[:7], np.append(plain_ids[20:31], 65)
    # Absorbers as padding too: their activations are the largest that there are.
    pad = np.full(5, 65)
    rows = np.stack([np.concatenate([pad, quiet] if left else [quiet, pad]), loud])
    mask = np.ones((2, 12), dtype=np.int64)
    text = slice(5, 12) if left else slice(0, 7)
    mask[0] = 0
    mask[0, text] = 1
    batched = codes_of(planted_model, scheme, prefix, torch.from_numpy(rows), torch.from_numpy(mask))
    alone = codes_of(planted_model, scheme, prefix, torch.from_numpy(quiet[None]), None)
    other = codes_of(planted_model, scheme, prefix, torch.from_numpy(loud[None]), None)
    for site in planted_model.sites:
        assert alone[site].shape[1] == 7, "the prefix is not among the inputs"
        assert agree(batched[site][0, text], alone[site][0]), site
        assert agree(batched[site][1], other[site][0]), site


def test_padding_is_forgotten_with_its_forward_pass(tiny_model: TorchRunner, plain_ids: IntArray) -> None:
    scheme, rows = parse_scheme("w8a8-dynamic"), torch.from_numpy(plain_ids[:16].reshape(2, 8))
    codes: list[Tensor] = []
    with simulated(tiny_model, scheme, None, lambda site, c: codes.append(c) if site == HEAD_SITE else None):
        mask = torch.ones_like(rows)
        mask[:, :3] = 0
        with torch.inference_mode():
            tiny_model.run(rows, KeysValues())
            tiny_model.run(rows, KeysValues(), mask)
            tiny_model.run(rows, KeysValues())
    assert torch.equal(codes[0], codes[2])
    assert not torch.equal(codes[0], codes[1])


@torch.inference_mode()
def test_a_dynamic_scheme_does_not_look_at_scales(tiny_model: TorchRunner, ids: Tensor) -> None:
    scheme = parse_scheme("w8a8-per-token")
    out = []
    for scales in (None, static_scales(tiny_model, parse_scheme("w4a4-asym"))):
        with simulated(tiny_model, scheme, scales):
            out.append(tiny_model.module(input_ids=ids).logits)
    assert torch.equal(*out)


@torch.inference_mode()
def test_without_scales_a_static_scheme_quantizes_weights_alone(
    tiny_model: TorchRunner, ids: Tensor, watch: Watch
) -> None:
    original = {m: m.weight.numpy().copy() for group in tiny_model.sites.values() for m in group}
    with simulated(tiny_model, parse_scheme("w4a4-static-asym-g24"), None):
        tiny_model.module(input_ids=ids)
    for linear, x in watch.inputs.items():
        expected = x @ weight_by_definition(original[linear], 4, 24).T
        np.testing.assert_allclose(watch.outputs[linear], expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["w8a8", "w8a8-per-token-asym"])
@torch.inference_mode()
def test_float_sites_keep_inputs_and_weights(name: str, tiny_model: TorchRunner, ids: Tensor) -> None:
    kept = (Site("layers.1.mlp.down"), Site("layers.0.attn.qkv"))
    scheme = dataclasses.replace(parse_scheme(name), float_sites=kept)
    assert set(quantized_sites(tiny_model, scheme)) == set(tiny_model.sites) - set(kept)
    scales = static_scales(tiny_model, scheme)
    seen = set()
    before = {linear: linear.weight.clone() for group in tiny_model.sites.values() for linear in group}
    with simulated(tiny_model, scheme, scales, lambda site, _: seen.add(site)):
        for site, linears in tiny_model.sites.items():
            assert all(torch.equal(linear.weight, before[linear]) is (site in kept) for linear in linears)
        tiny_model.module(input_ids=ids)
    assert seen == set(tiny_model.sites) - set(kept)


def test_a_float_site_that_the_model_lacks_is_refused(tiny_model: TorchRunner) -> None:
    scheme = QuantScheme(float_sites=(Site("layers.7.mlp.down"),))
    with pytest.raises(UsageError, match=r"layers\.7\.mlp\.down"), simulated(tiny_model, scheme, None):
        pass


def test_weights_are_quantized_as_told_and_per_channel_in_eight_bits_if_not(tiny_model: TorchRunner) -> None:
    linear = tiny_model.module.model.layers[0].mlp.up_proj
    original = linear.weight.numpy().copy()
    for options in ({}, {"bits": 4}, {"group": 24}, {"bits": 6, "group": 16}):
        with quantized_weights(tiny_model, tiny_model.sites, **options):
            expected = weight_by_definition(original, options.get("bits", 8), options.get("group", 0))
            np.testing.assert_array_equal(linear.weight.numpy(), expected)
        np.testing.assert_array_equal(linear.weight.numpy(), original)


@pytest.mark.parametrize(
    ("scheme", "scales", "words"),
    [
        ("w8a8-static-asym", "w8a8", "asymmetric activations of 8 bits, and the scales are symmetric for 8"),
        ("w8a8", "w8a8-static-asym", "symmetric activations of 8 bits, and the scales are asymmetric for 8"),
        ("w6a6-static", "w8a8", "symmetric activations of 6 bits, and the scales are symmetric for 8"),
    ],
)
def test_scales_of_another_kind_are_refused(scheme: str, scales: str, words: str, tiny_model: TorchRunner) -> None:
    given_scales = static_scales(tiny_model, parse_scheme(scales))
    with pytest.raises(UsageError, match=words), simulated(tiny_model, parse_scheme(scheme), given_scales):
        pass


def test_a_scheme_with_smoothquant_wants_a_model_with_smoothquant(tiny_model: TorchRunner) -> None:
    scheme = parse_scheme("smoothquant-o1")
    with pytest.raises(UsageError, match="SmoothQuant") as e, simulated(tiny_model, scheme, None):
        pass
    assert "fold" in e.value.hint
    wanted = absorbers(tiny_model.family, tiny_model.spec)
    factors = {site: np.full(tiny_model.sites[site][0].in_features, 2, dtype=np.float32) for site in wanted}
    folded = tiny_model.folded(Smoothing(factors, 0.5, tiny_model.spec.weights_digest))
    with simulated(folded, scheme, None):
        pass


def values_entering(model: TorchRunner, rows: IntArray) -> Mapping[Site, Array]:
    """Return what enters each Site, run without cache and without any hook of the package."""
    found: dict[Site, Array] = {}
    handles = [
        linears[0].register_forward_hook(lambda _, args, __, site=site: found.__setitem__(site, args[0].numpy()))
        for site, linears in model.sites.items()
    ]
    with torch.inference_mode():
        model.module(input_ids=torch.from_numpy(rows), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("bits", [8, 6])
def test_calibrated_asymmetric_scales_span_what_they_saw(
    bits: int, tiny_model: TorchRunner, plain_ids: IntArray
) -> None:
    rows, prefix = plain_ids[:40].reshape(4, 10), Prefix.empty(tiny_model.spec)
    histograms = observe_sites(tiny_model, prefix, rows, np.ones_like(rows), batch_size=4)
    scales = choose_scales(
        histograms, RangeEstimator("max"), tiny_model.lineage(prefix, "c"), 40, bits=bits, symmetric=False
    )
    assert scales.bits == bits
    for site, x in values_entering(tiny_model, rows).items():
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        assert scales.scales[site] == pytest.approx((high - low) / (2**bits - 1), rel=1e-4)
        assert abs(scales.zero_points[site] + low / scales.scales[site]) <= 0.51
    extremes: dict[Site, tuple[int, int]] = {}
    scheme = parse_scheme(f"w8a{bits}-static-asym")
    with (
        torch.inference_mode(),
        simulated(tiny_model, scheme, scales, lambda s, c: extremes.__setitem__(s, (int(c.min()), int(c.max())))),
    ):
        tiny_model.module(input_ids=torch.from_numpy(rows))
    first = extremes[Site("layers.0.attn.qkv")]
    assert first[0] <= 1
    assert first[1] >= 2**bits - 2
    symmetric = choose_scales(histograms, RangeEstimator("max"), tiny_model.lineage(prefix, "c"), 40, bits=bits)
    for site, histogram in histograms.items():
        assert symmetric.scales[site] == pytest.approx(histogram.amax / (2 ** (bits - 1) - 1), rel=1e-6)
    assert not symmetric.zero_points
