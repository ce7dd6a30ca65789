"""Simulate quantization schemes in torch; a deployable one gives exactly the codes of the exported graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cushion_deploy.core.fakequant import levels, qmax
from cushion_deploy.core.kv_scales import KV_PARTS, KvPart, KvScales, kv_site
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import EMBEDDING_BLOCK, QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.fakequant import quantize_asymmetric_codes, quantize_codes
from cushion_deploy.modeling.observe import replaced
from cushion_deploy.modeling.observe_cache import watched_cache
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.weight_state import WeightFormat

Grid = tuple[Tensor, Tensor | None]
"""Scale and, for asymmetric codes, zero point (an integer value); both float32, both broadcast against the input."""


def dynamic_grid(x: Tensor, scheme: QuantScheme, text: Tensor | None = None) -> Grid:
    """Return the grid of a dynamic scheme, computed from ``x`` itself.

    A per-tensor dynamic grid covers all text tokens of one row in this forward pass, so that a result does not depend
    on which rows share a batch. The scale of values that are all zero is 1.

    Args:
        x: float32 ``[batch, length, features]``.
        scheme: a dynamic scheme.
        text: bool ``[batch, length]``, False on padding, which no range includes; None if nothing is padded.

    Returns:
        Scale and zero point, ``[batch, 1, 1]`` per tensor and ``[batch, length, 1]`` per token.
    """
    shared = (1, 2) if scheme.activations == "dynamic" else (2,)
    if text is not None:
        x = x.masked_fill(~text[..., None], 0.0)
    tiny, one = torch.finfo(torch.float32).tiny, x.new_ones(())
    if scheme.symmetric:
        # The divisor is a tensor: a Python number may be applied in double precision or as its reciprocal.
        scale = x.abs().amax(shared, keepdim=True) / x.new_tensor(float(qmax(scheme.activation_bits)))
        return torch.where(scale < tiny, one, scale), None
    low, high = x.amin(shared, keepdim=True).clamp(max=0.0), x.amax(shared, keepdim=True).clamp(min=0.0)
    largest = float(levels(scheme.activation_bits))
    scale = (high - low) / x.new_tensor(largest)
    scale = torch.where(scale < tiny, one, scale)
    return scale, torch.round(-low / scale).clamp(0.0, largest)


def quantized_sites(model: TorchRunner, scheme: QuantScheme) -> dict[Site, tuple[nn.Linear, ...]]:
    """Return the Sites that the scheme quantizes.

    Raises:
        UsageError: a Site that the scheme keeps in floating point does not exist in the model.
    """
    return scheme.of(model.sites)


@contextmanager
def quantized_weights(
    model: TorchRunner,
    sites: Mapping[Site, tuple[nn.Linear, ...]],
    bits: int = 8,
    group: int = 0,
    *,
    int8_embedding: bool = False,
) -> Iterator[None]:
    """Replace the weights of the linears of these Sites by their dequantized codes; restored on exit.

    A tied head is quantized without changing the embedding; a quantized embedding changes a tied head, unless that is
    quantized itself.

    Args:
        model: the model.
        sites: the Sites whose linears are quantized.
        bits: bits of the codes.
        group: input features that share a scale; 0 for one scale per output channel.
        int8_embedding: whether the token embedding becomes INT8 codes with one scale per ``EMBEDDING_BLOCK`` values.
    """
    paths = model.family.linears(model.spec, head=True)
    formats = {
        f"{path}.weight": WeightFormat(f"{site}[{i}]", bits, group)
        for site in sites
        for i, path in enumerate(paths[site])
    }
    if int8_embedding:
        formats[f"{model.family.embedding}.weight"] = WeightFormat("embedding", group=EMBEDDING_BLOCK)
    with model.quantized(formats):
        yield


@contextmanager
def simulated(
    model: TorchRunner,
    scheme: QuantScheme,
    scales: ActivationScales | None,
    on_codes: Callable[[Site, Tensor], None] | None = None,
    kv: KvScales | None = None,
) -> Iterator[None]:
    """Quantize weights and Site inputs as the scheme says in every forward pass of the model; undone on exit.

    Args:
        model: the model, with any smoothing already folded in.
        scheme: any scheme, deployable or not.
        scales: scales of a static scheme; None leaves activations in floating point. A dynamic scheme ignores them.
        on_codes: called with the codes ``[batch, length, features]`` that enter each Site, int8 for symmetric and
            uint8 for asymmetric activations; also with those that enter an INT8 cache, see :func:`quantized_cache`.
        kv: scales of an INT8 cache; None for a floating-point cache.

    Raises:
        UsageError: a Site has no scale or no zero point, bits or symmetry of the scales are not those of the scheme,
            or the scheme needs SmoothQuant and no smoothing is folded into the model.
    """
    if scheme.smoothing and not (model.smoothing and model.smoothing.factors):
        raise UsageError(
            f"scheme {scheme.name} needs SmoothQuant, and no smoothing is folded into the model",
            hint="fold a smoothing into the model first",
        )
    sites, bits = quantized_sites(model, scheme), scheme.activation_bits
    kind = torch.int8 if scheme.symmetric else torch.uint8
    with ExitStack() as stack:
        grid_of = None
        if scheme.activations != "static":
            grid_of = _dynamic_grids(model, scheme)
        elif scales is not None:
            grid_of = _static_grids(model, scheme, scales, sites)
        if grid_of is not None:
            grid = grid_of

            def transform(site: Site, x: Tensor) -> Tensor:
                scale, zero = grid(site, x.float())
                if zero is None:
                    codes = quantize_codes(x, scale, bits)
                else:
                    codes = quantize_asymmetric_codes(x, scale, zero, bits)
                if on_codes:
                    on_codes(site, codes.to(kind))
                return (codes * scale if zero is None else (codes - zero) * scale).to(x.dtype)

            stack.enter_context(replaced(model, transform, sites))
        weights = quantized_weights(
            model, sites, scheme.weight_bits, scheme.weight_group, int8_embedding=scheme.int8_embedding
        )
        stack.enter_context(weights)
        if kv is not None:
            stack.enter_context(quantized_cache(model, kv, on_codes))
        yield


def _static_grids(
    model: TorchRunner, scheme: QuantScheme, scales: ActivationScales, sites: Mapping[Site, Any]
) -> Callable[[Site, Tensor], Grid]:
    """Return a function from Site and input to the Site's constant grid.

    Raises:
        UsageError: bits or symmetry of the scales are not those of the scheme.
    """
    steps = scales.of(sites)
    found = (scales.bits, not scales.zero_points)
    if found != (scheme.activation_bits, scheme.symmetric):
        words = ("asymmetric", "symmetric")
        raise UsageError(
            f"scheme {scheme.name} has {words[scheme.symmetric]} activations of {scheme.activation_bits} bits, "
            f"and the scales are {words[found[1]]} for {found[0]} bits",
            hint="choose scales from the histograms with the bits and the symmetry of the scheme",
        )
    # float32 tensors: a Python float would be applied in double precision and change codes.
    grids: dict[Site, Grid] = {
        site: (
            model.tensor(np.float32(step)),
            None if scheme.symmetric else model.tensor(np.float32(scales.zero_points[site])),
        )
        for site, step in steps.items()
    }
    return lambda site, _: grids[site]


def _dynamic_grids(model: TorchRunner, scheme: QuantScheme) -> Callable[[Site, Tensor], Grid]:
    """Return a function from Site and input to grid that leaves out the padding of the current forward pass."""

    def grid(_: Site, x: Tensor) -> Grid:
        mask = model.current.mask
        # A head that runs on the last tokens only needs the end of the mask.
        return dynamic_grid(x, scheme, None if mask is None else mask[:, -x.shape[1] :].bool())

    return grid


@contextmanager
def quantized_cache(
    model: TorchRunner, kv: KvScales, on_codes: Callable[[Site, Tensor], None] | None = None
) -> Iterator[None]:
    """Run the model with a cache that holds dequantized INT8 codes.

    New tokens attend to their own keys and values after quantization too, so that decode equals prefill, and both equal
    the graph. A prefix in the cache is quantized like the rest of it; a prefix in the graph stays in floating point.

    Args:
        model: the model.
        kv: the scales of the cache.
        on_codes: called with ``layers.<i>.kv.<part>`` and the codes of new tokens, int8
            ``[batch, length, kv_heads, head_dim]``.
    """
    steps = {(layer, part): model.tensor(scales)[:, None, None] for layer, part, scales in kv.rows()}

    def entering(layer: int, part: KvPart, states: Tensor) -> Tensor:
        step = steps[layer, part]
        codes = quantize_codes(states, step)
        if on_codes:
            on_codes(kv_site(layer, part), codes.to(torch.int8).transpose(1, 2))
        return (codes * step).to(states.dtype)

    def held(cache: DynamicCache) -> None:
        # States that came through `entering` do not change: dequantized codes round to themselves.
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized:
                layer.keys, layer.values = (
                    (quantize_codes(states, steps[i, part]) * steps[i, part]).to(states.dtype)
                    for part, states in zip(KV_PARTS, (layer.keys, layer.values), strict=True)
                )

    with watched_cache(model, entering, held if kv.with_prefix else None):
        yield
