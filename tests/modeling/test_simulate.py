"""Simulated W8A8 equals quantized linears written out by hand in numpy, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import quantize
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE, Site, layer_site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.fakequant import quantize_codes
from cushion_deploy.modeling.load import load_folder
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.modeling.source import resolve_source

SCHEME = QuantScheme()


@pytest.fixture
def ids(plain_ids: IntArray) -> Tensor:
    return torch.from_numpy(plain_ids[:24].reshape(2, 12))


def scales_for(model: TorchRunner, scale: float = 0.05) -> ActivationScales:
    """Return made-up scales, another one for each Site."""
    values = {site: float(np.float32(scale * (1 + i / 16))) for i, site in enumerate(model.sites)}
    return ActivationScales(values, "max", Lineage(model.spec.weights_digest, "p", text="c"), 1)


@pytest.fixture
def captured(tiny_model: TorchRunner) -> Iterator[dict[torch.nn.Module, tuple[np.ndarray, np.ndarray]]]:
    """Collect input (before any replacement) and output of every linear."""
    found: dict[torch.nn.Module, tuple[np.ndarray, np.ndarray]] = {}

    def keep(m: torch.nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        found[m] = (args[0].numpy().copy(), out.numpy().copy())

    linears = [linear for group in tiny_model.sites.values() for linear in group]
    handles = [m.register_forward_hook(keep) for m in linears]
    yield found
    for handle in handles:
        handle.remove()


def integer_linear(codes: np.ndarray, scale: float, weight: np.ndarray) -> np.ndarray:
    """Return s_x * s_w * (integer matrix product), the sums exact in int64."""
    amax = np.abs(weight).max(axis=1).astype(np.float32)
    step = (amax / np.float32(127)).astype(np.float32)
    weight_codes = np.clip(np.rint(weight / step[:, None]), -128, 127).astype(np.int64)
    return (codes.astype(np.int64) @ weight_codes.T) * (np.float64(scale) * step)


@torch.inference_mode()
def test_every_linear_computes_the_integer_product_of_its_codes(
    tiny_model: TorchRunner, ids: Tensor, captured: dict[torch.nn.Module, tuple[np.ndarray, np.ndarray]]
) -> None:
    scales, codes = scales_for(tiny_model), dict[Site, np.ndarray]()
    original = {m: m.weight.numpy().copy() for group in tiny_model.sites.values() for m in group}
    with simulated(tiny_model, SCHEME, scales, lambda site, c: codes.__setitem__(site, c.numpy().copy())):
        tiny_model.module(input_ids=ids)
    assert list(codes) == list(tiny_model.sites)
    for site, linears in tiny_model.sites.items():
        assert codes[site].dtype == np.int8
        for linear in linears:
            expected = integer_linear(codes[site], scales.scales[site], original[linear])
            np.testing.assert_allclose(captured[linear][1], expected, rtol=1e-4, atol=1e-3)


@torch.inference_mode()
def test_the_codes_of_the_first_site_are_the_rounded_norm_output(tiny_model: TorchRunner, ids: Tensor) -> None:
    scales, codes = scales_for(tiny_model), dict[Site, np.ndarray]()
    with simulated(tiny_model, SCHEME, scales, lambda site, c: codes.__setitem__(site, c.numpy().copy())):
        tiny_model.module(input_ids=ids)
    site = layer_site(0, "attn.qkv")
    hidden = tiny_model.module.model.embed_tokens.weight.numpy()[ids.numpy()]
    normed = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + tiny_model.spec.norm_eps)
    exact = normed / scales.scales[site]
    settled = np.abs(exact - np.floor(exact) - 0.5) > 1e-3
    expected = np.clip(np.rint(exact), -128, 127)
    np.testing.assert_array_equal(codes[site][settled], expected[settled])


@torch.inference_mode()
def test_without_scales_only_the_weights_are_quantized(
    tiny_model: TorchRunner, ids: Tensor, captured: dict[torch.nn.Module, tuple[np.ndarray, np.ndarray]]
) -> None:
    original = {m: m.weight.numpy().copy() for group in tiny_model.sites.values() for m in group}
    with simulated(tiny_model, SCHEME, None):
        tiny_model.module(input_ids=ids)
    for linear, (x, y) in captured.items():
        weight = original[linear].astype(np.float64)
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
        np.testing.assert_allclose(y, x @ (np.rint(weight / step) * step).T, rtol=1e-3, atol=2e-3)


@torch.inference_mode()
def test_the_head_stays_in_floating_point_on_request(tiny_model: TorchRunner, ids: Tensor) -> None:
    scheme, seen = QuantScheme(quantize_head=False), []
    assert HEAD_SITE not in quantized_sites(tiny_model, scheme)
    scales = scales_for(tiny_model)
    no_head = dataclasses.replace(scales, scales={k: v for k, v in scales.scales.items() if k != HEAD_SITE})
    weight = tiny_model.module.lm_head.weight
    with simulated(tiny_model, scheme, no_head, lambda site, _: seen.append(site)):
        assert tiny_model.module.lm_head.weight is weight
        tiny_model.module(input_ids=ids)
    assert HEAD_SITE not in seen
    assert len(seen) == 12


def test_a_site_without_scale_is_refused_before_anything_changes(tiny_model: TorchRunner) -> None:
    scales = scales_for(tiny_model)
    partial = dataclasses.replace(scales, scales={k: v for k, v in scales.scales.items() if "mlp.down" not in k})
    weight = tiny_model.module.model.layers[0].self_attn.q_proj.weight
    found = r"layers\.0\.mlp\.down \(3 missing\)"
    with pytest.raises(UsageError, match=found) as e, simulated(tiny_model, SCHEME, partial):
        pass
    assert "calibrate" in e.value.hint
    assert tiny_model.module.model.layers[0].self_attn.q_proj.weight is weight


@torch.inference_mode()
def test_the_model_is_itself_again_afterwards_even_after_an_error(tiny_model: TorchRunner, ids: Tensor) -> None:
    parameters = dict(tiny_model.module.named_parameters())
    copies = {name: p.clone() for name, p in parameters.items()}
    logits = tiny_model.module(input_ids=ids).logits
    with pytest.raises(ZeroDivisionError), simulated(tiny_model, SCHEME, scales_for(tiny_model)):  # noqa: PT012
        assert not torch.equal(tiny_model.module(input_ids=ids).logits, logits)
        raise ZeroDivisionError
    after = dict(tiny_model.module.named_parameters())
    assert all(torch.equal(after[name], copies[name]) for name in parameters)
    assert torch.equal(tiny_model.module(input_ids=ids).logits, logits)


@torch.inference_mode()
def test_a_tied_head_is_quantized_and_the_embedding_is_not(
    tiny_writer: Callable[..., Path], tmp_path: Path, ids: Tensor
) -> None:
    folder = tiny_writer(tmp_path, tie_word_embeddings=True)
    model = load_folder(folder, resolve_source(str(folder)))
    embedding = model.module.model.embed_tokens.weight
    copy = embedding.clone()
    with simulated(model, SCHEME, scales_for(model)):
        model.module(input_ids=ids)
        assert model.module.model.embed_tokens.weight is embedding
        assert torch.equal(embedding, copy)
        assert not torch.equal(model.module.lm_head.weight, copy)
    assert model.module.lm_head.weight is embedding
    assert torch.equal(embedding, copy)


@settings(deadline=None, derandomize=True)
@given(hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32)), st.floats(2.0**-8, 2.0**8, width=32))
def test_torch_codes_equal_the_numpy_oracle(x: np.ndarray, scale: float) -> None:
    codes = quantize_codes(torch.from_numpy(x.copy()), torch.tensor(scale, dtype=torch.float32))
    np.testing.assert_array_equal(codes.numpy(), quantize(x, scale))


def test_torch_rounds_halves_to_even_and_saturates() -> None:
    x = torch.tensor([-1e9, -128.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 127.5, 1e9])
    assert quantize_codes(x, torch.tensor(1.0)).tolist() == [-128, -128, -2, -2, 0, 0, 2, 2, 127, 127]
    assert quantize_codes(x[[0, -1]], torch.tensor(1.0), bits=4).tolist() == [-8, 7]
