"""Simulate static W8A8 in torch: the same codes as the exported graph, computed in floating point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from cushion_deploy.fakequant import dequantize, qmax, quantize_weight
from cushion_deploy.modeling.load import LoadedModel
from cushion_deploy.modeling.observe import replaced
from cushion_deploy.types import HEAD_SITE, ActivationScales, QuantScheme, Site


def quantize_codes(x: Tensor, scale: Tensor, bits: int = 8) -> Tensor:
    """Return the integer codes of ``x``, still in its floating-point type; ``scale`` broadcasts.

    A division, not a multiplication by the reciprocal: ONNX QuantizeLinear divides.
    """
    limit = qmax(bits)
    return torch.clamp(torch.round(x / scale), -limit - 1, limit)


def quantized_sites(model: LoadedModel, scheme: QuantScheme) -> dict[Site, tuple[nn.Linear, ...]]:
    """Return the Sites that the scheme quantizes."""
    return {site: linears for site, linears in model.sites.items() if scheme.quantize_head or site != HEAD_SITE}


@contextmanager
def quantized_weights(sites: Mapping[Site, tuple[nn.Linear, ...]]) -> Iterator[None]:
    """Give the linears of these Sites the values of their INT8 weights; restored on exit.

    A tied head is quantized without touching the embedding.
    """
    with ExitStack() as stack:
        for site, linears in sites.items():
            for i, linear in enumerate(linears):
                original = linear.weight
                codes, scale = quantize_weight(original.detach().numpy(), f"{site}[{i}]")
                quantized = torch.from_numpy(dequantize(codes, scale[:, None]))
                linear.weight = nn.Parameter(quantized, requires_grad=False)
                stack.callback(setattr, linear, "weight", original)
        yield


@contextmanager
def simulated(
    model: LoadedModel,
    scheme: QuantScheme,
    scales: ActivationScales | None,
    on_codes: Callable[[Site, Tensor], None] | None = None,
) -> Iterator[None]:
    """Run the model with INT8 weights and, unless ``scales`` is None, static INT8 activations.

    ``on_codes`` is called with the int8 codes ``[batch, length, features]`` that enter each Site.

    Raises:
        UsageError: a Site has no scale.
    """
    sites = quantized_sites(model, scheme)
    with ExitStack() as stack:
        if scales is not None:
            # float32 scalars: a Python float would be applied in double precision and change codes.
            values = {site: torch.tensor(scale, dtype=torch.float32) for site, scale in scales.of(sites).items()}

            def transform(site: Site, x: Tensor) -> Tensor:
                codes = quantize_codes(x, values[site])
                if on_codes:
                    on_codes(site, codes.to(torch.int8))
                return codes * values[site]

            stack.enter_context(replaced(sites, transform))
        stack.enter_context(quantized_weights(sites))
        yield
