"""What each Site costs: the divergence from the original model when that Site alone is quantized."""

from __future__ import annotations

from dataclasses import replace

import torch

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.modeling.teacher import divergence


@torch.inference_mode()
def site_costs(
    model: TorchRunner,
    prefix: Prefix,
    scheme: QuantScheme,
    scales: ActivationScales,
    windows: IntArray,
    progress: Progress = silent,
) -> dict[Site, float]:
    """Return each quantized Site with its cost, in the order of the computation.

    The cost is the mean KL divergence (nats a token) from the float model behind the same prefix, with that Site's
    input and weights quantized and everything else in floating point: costs of single Sites nearly add up.

    Args:
        model: the model as it is deployed (smoothing folded in).
        prefix, scheme, scales: what is deployed.
        windows: int64 ``[count, length]`` of text.
        progress: where to report Sites done.
    """
    sites = list(quantized_sites(model, scheme))
    past, ids = prefix_tensors(prefix), torch.from_numpy(windows)
    teacher = torch.log_softmax(model.run(ids, past).logits[:, :-1].float(), -1)
    found: dict[Site, float] = {}
    for done, site in enumerate(sites, 1):
        others = tuple(other for other in sites if other != site)
        with simulated(model, replace(scheme, float_sites=others), scales):
            student = torch.log_softmax(model.run(ids, past).logits[:, :-1].float(), -1)
        found[site] = float(divergence(student, teacher).mean())
        progress("measuring what each Site costs", done, len(sites))
    return found
