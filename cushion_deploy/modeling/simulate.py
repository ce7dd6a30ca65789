"""Simulate quantization schemes in torch: for a deployable one, the very codes of the exported graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cushion_deploy.core.fakequant import dequantize, levels, qmax, quantize_weight, spread
from cushion_deploy.core.kv_scales import KV_PARTS, KvPart, KvScales, kv_site
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.kv_cache import watched_cache
from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.modeling.observe import replaced

Grid = tuple[Tensor, Tensor | None]
"""Scale and, for asymmetric codes, zero point (a whole number); both float32, both broadcast against the input."""


def quantize_codes(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Return the integer codes of ``x``, still in its floating-point type; ``scale`` broadcasts.

    A division, not a multiplication by the reciprocal: ONNX QuantizeLinear divides.
    """
    limit = qmax(bits)
    return torch.clamp(torch.round(x / scale), -limit - 1, limit)


def quantize_asymmetric_codes(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int = 8) -> Tensor:
    """Return the codes of ``x`` from 0 to 2^bits - 1, still in its floating-point type; both parameters broadcast."""
    return torch.clamp(torch.round(x / scale) + zero_point, 0, levels(bits))


def dynamic_grid(x: Tensor, scheme: QuantScheme, text: Tensor | None = None) -> Grid:
    """Return the grid that ``x`` itself determines.

    Per-tensor dynamic means one grid for every row of the batch, over all its text tokens in this forward pass, so
    that a result does not depend on which rows share a batch. Where there is nothing but zeros, the scale is 1.

    Args:
        x: ``[batch, length, features]``.
        scheme: says which values share a grid, and its kind.
        text: bool ``[batch, length]``, False on padding; None where there is none. Padding enters no range.

    Returns:
        Scale and zero point ``[batch, 1, 1]``, per token ``[batch, length, 1]``.
    """
    shared = (1, 2) if scheme.activations == "dynamic" else (2,)
    if text is not None:
        x = x.masked_fill(~text[..., None], 0.0)
    tiny, one = torch.finfo(torch.float32).tiny, x.new_ones(())
    if scheme.symmetric:
        # Divisors are tensors, because a Python number may be applied in double precision or as its reciprocal.
        scale = x.abs().amax(shared, keepdim=True) / x.new_tensor(float(qmax(scheme.activation_bits)))
        return torch.where(scale < tiny, one, scale), None
    low, high = x.amin(shared, keepdim=True).clamp(max=0.0), x.amax(shared, keepdim=True).clamp(min=0.0)
    largest = float(levels(scheme.activation_bits))
    scale = (high - low) / x.new_tensor(largest)
    scale = torch.where(scale < tiny, one, scale)
    return scale, torch.round(-low / scale).clamp(0.0, largest)


def quantized_sites(model: LoadedModel, scheme: QuantScheme) -> dict[Site, tuple[nn.Linear, ...]]:
    """Return the Sites that the scheme quantizes.

    Raises:
        UsageError: the scheme keeps a Site in floating point that the model does not have.
    """
    return scheme.of(model.sites)


@contextmanager
def quantized_weights(sites: Mapping[Site, tuple[nn.Linear, ...]], bits: int = 8, group: int = 0) -> Iterator[None]:
    """Give the linears of these Sites the values of their quantized weights; restored on exit.

    A tied head is quantized without touching the embedding.

    Args:
        sites: whose linears.
        bits: of the codes.
        group: input features that share a scale; 0 for one scale an output channel.
    """
    with ExitStack() as stack:
        for site, linears in sites.items():
            for i, linear in enumerate(linears):
                original = linear.weight
                codes, scale = quantize_weight(original.detach().numpy(), f"{site}[{i}]", bits, group)
                quantized = torch.from_numpy(dequantize(codes, spread(scale, codes.shape[1], group)))
                linear.weight = nn.Parameter(quantized, requires_grad=False)
                stack.callback(setattr, linear, "weight", original)
        yield


@contextmanager
def simulated(
    model: LoadedModel,
    scheme: QuantScheme,
    scales: ActivationScales | None,
    on_codes: Callable[[Site, Tensor], None] | None = None,
    kv: KvScales | None = None,
) -> Iterator[None]:
    """Run the model with the weights and Site inputs that the scheme says quantized.

    Args:
        model: what runs. SmoothQuant is not folded here: give the folded model.
        scheme: any scheme, deployable or not.
        scales: of a static scheme; None leaves its activations in floating point. A dynamic scheme takes its
            scales from what it sees and does not look at these.
        on_codes: called with the codes ``[batch, length, features]`` that enter each Site, int8 for symmetric and
            uint8 for asymmetric activations; and with those that enter an INT8 cache, see ``quantized_cache``.
        kv: scales of an INT8 cache; None leaves it in floating point.

    Raises:
        UsageError: a Site has no scale or no zero point, the scales are of another kind than the scheme, or the
            scheme wants SmoothQuant and the model has none.
    """
    if scheme.smoothing and model.smoothing is None:
        raise UsageError(
            f"scheme {scheme.name} is meant with SmoothQuant, and nothing is folded into the model",
            hint="fold a smoothing into the model first",
        )
    sites, bits = quantized_sites(model, scheme), scheme.activation_bits
    kind = torch.int8 if scheme.symmetric else torch.uint8
    with ExitStack() as stack:
        grid_of = None
        if scheme.activations != "static":
            grid_of = stack.enter_context(_dynamic_grids(model, scheme))
        elif scales is not None:
            grid_of = _static_grids(scheme, scales, sites)
        if grid_of is not None:
            grid = grid_of

            def transform(site: Site, x: Tensor) -> Tensor:
                scale, zero = grid(site, x)
                if zero is None:
                    codes = quantize_codes(x, scale, bits)
                else:
                    codes = quantize_asymmetric_codes(x, scale, zero, bits)
                if on_codes:
                    on_codes(site, codes.to(kind))
                return codes * scale if zero is None else (codes - zero) * scale

            stack.enter_context(replaced(model, transform, sites))
        stack.enter_context(quantized_weights(sites, scheme.weight_bits, scheme.weight_group))
        if kv is not None:
            stack.enter_context(quantized_cache(model, kv, on_codes))
        yield


def _static_grids(
    scheme: QuantScheme, scales: ActivationScales, sites: Mapping[Site, Any]
) -> Callable[[Site, Tensor], Grid]:
    """Return the grid of a Site whatever enters it; raises UsageError for scales of another kind than the scheme."""
    steps = scales.of(sites)
    found = (scales.bits, not scales.zero_points)
    if found != (scheme.activation_bits, scheme.symmetric):
        words = ("asymmetric", "symmetric")
        raise UsageError(
            f"scheme {scheme.name} has {words[scheme.symmetric]} activations of {scheme.activation_bits} bits, "
            f"and the scales are {words[found[1]]} for {found[0]} bits",
            hint="choose scales from the histograms with the bits and the symmetry of the scheme",
        )
    # float32 scalars: a Python float would be applied in double precision and change codes.
    grids: dict[Site, Grid] = {
        site: (
            torch.tensor(step, dtype=torch.float32),
            None if scheme.symmetric else torch.tensor(float(scales.zero_points[site]), dtype=torch.float32),
        )
        for site, step in steps.items()
    }
    return lambda site, _: grids[site]


@contextmanager
def _dynamic_grids(model: LoadedModel, scheme: QuantScheme) -> Iterator[Callable[[Site, Tensor], Grid]]:
    """Yield a function from Site and input to grid that knows the padding of the forward pass under way."""
    padding: list[Tensor | None] = [None]

    def remember(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise UsageError(
                f"an attention mask {tuple(mask.shape)} does not say which tokens are padding",
                hint="give a mask [batch, past + length]",
            )
        padding[0] = mask

    def grid(_: Site, x: Tensor) -> Grid:
        # The mask begins with what is cached; a head that runs on the last tokens alone sees the end of it.
        text = None if padding[0] is None else padding[0][:, -x.shape[1] :].bool()
        return dynamic_grid(x, scheme, text)

    handle = model.decoder.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        yield grid
    finally:
        handle.remove()


@contextmanager
def quantized_cache(
    model: LoadedModel, kv: KvScales, on_codes: Callable[[Site, Tensor], None] | None = None
) -> Iterator[None]:
    """Run the model with a cache that holds the values of INT8 codes.

    New tokens attend to their own keys and values as codes too, so that decoding gives what prefill gives, and both
    what the graph computes. A prefix in the cache is quantized like everything there; one that the graph has inside
    stays as it is.

    Args:
        model: the model.
        kv: scales.
        on_codes: called with ``layers.<i>.kv.<part>`` and the codes of new tokens, int8
            ``[batch, length, kv_heads, head_dim]``.
    """
    steps = {(layer, part): torch.from_numpy(scales)[:, None, None] for layer, part, scales in kv.rows()}

    def entering(layer: int, part: KvPart, states: Tensor) -> Tensor:
        step = steps[layer, part]
        codes = quantize_codes(states, step)
        if on_codes:
            on_codes(kv_site(layer, part), codes.to(torch.int8).transpose(1, 2))
        return codes * step

    def held(cache: DynamicCache) -> None:
        # What came through `entering` stays what it is: the values of codes round to themselves.
        for i, layer in enumerate(cache.layers):
            if layer.is_initialized:
                layer.keys, layer.values = (
                    quantize_codes(states, steps[i, part]) * steps[i, part]
                    for part, states in zip(KV_PARTS, (layer.keys, layer.values), strict=True)
                )

    with watched_cache(model, entering, held if kv.with_prefix else None):
        yield
