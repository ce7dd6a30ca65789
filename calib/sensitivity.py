"""Sensitivity of each Site: the divergence from the floating-point model if only that Site is quantized."""

from __future__ import annotations

from dataclasses import replace

import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.modeling.teacher import Teacher


@torch.inference_mode()
def site_costs(
    model: TorchRunner, quantization: Quantization, windows: IntArray, progress: Progress = silent
) -> dict[Site, float]:
    """Return the cost of each quantized Site, in the order of computation.

    The cost is the mean KL divergence (nats per token) from the floating-point model behind the same prefix, with that
    Site's input and weights quantized and everything else in floating point. The costs of single Sites nearly add up.

    Args:
        model: the model; the smoothing of ``quantization`` is folded in if it is not yet.
        quantization: prefix, smoothing, scheme and activation scales.
        windows: text int64 ``[count, length]``.
        progress: where to report the number of Sites done.
    """
    # The embedding is no Site: quantized, it would be part of every cost.
    model, scheme = model.folded(quantization.smoothing), replace(quantization.scheme, int8_embedding=False)
    sites = list(quantized_sites(model, scheme))
    teacher = Teacher(model, quantization.prefix)
    teacher.remember(windows)
    found: dict[Site, float] = {}
    for done, site in enumerate(sites, 1):
        others = tuple(other for other in sites if other != site)
        with simulated(model, replace(scheme, float_sites=others), quantization.scales):
            found[site] = teacher.compare(model, quantization.prefix, windows).divergence
        progress("measuring the cost of each Site", done, len(sites))
    return found
