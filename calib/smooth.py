"""SmoothQuant factors: how much of each input channel's size moves into the weights.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for every input channel j (Xiao et al., 2023, Eq. 4). What a prefix leaves
of sinks (articles and spaces that carry 20 times the rest) sits in one or two channels of a down projection, which
alpha alone would have to be near 1 to tame; but with alpha near 1 every channel is as large as its range, and text
that was not calibrated on is clipped. So the few largest channels are divided down to a limit, and the others keep
their headroom.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.families.folding import absorbers
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.observe import observed

SMALLEST = 1e-5
"""The least magnitude that counts of a weight: a channel that nothing reads keeps a finite factor."""
USUAL = 0.9
"""The channel that others are measured by: this share of the channels that were seen is smaller."""
QUIET = 0.02
"""The least magnitude that counts of a channel, as a share of the usual one. A channel that calibration hardly saw,
such as one behind a ReLU that did not fire, would be blown up to the size of the others, and clipped when it fires."""


@torch.inference_mode()
def channel_maxima(
    model: TorchRunner, prefix: Prefix, ids: IntArray, mask: IntArray, *, batch: int = 4, progress: Progress = silent
) -> dict[Site, FloatArray]:
    """Return the largest magnitude of each input channel of every Site, text tokens behind the prefix only.

    Args:
        model, prefix: what runs.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        batch: windows a forward pass.
        progress: where to report windows done.

    Returns:
        Site to float32 ``[features]``.
    """
    found: dict[Site, Tensor] = {}
    rows = torch.from_numpy(mask)
    chosen = rows[:0].bool()

    def keep(site: Site, x: Tensor) -> None:
        largest = x[chosen].abs().amax(dim=0)
        found[site] = torch.maximum(found[site], largest) if site in found else largest

    past = prefix_tensors(prefix)
    with observed(model, keep):
        for start in range(0, len(ids), batch):
            part = rows[start : start + batch]
            chosen = part.bool()
            model.run(torch.from_numpy(ids[start : start + batch]), past, None if bool(chosen.all()) else part)
            progress("measuring channels", min(start + batch, len(ids)), len(ids))
    return {site: value.numpy() for site, value in found.items()}


def choose_factors(
    model: TorchRunner, maxima: Mapping[Site, FloatArray], alpha: float, limit: float | None = None
) -> Smoothing:
    """Return the factors of every Site of the model that has an absorber.

    Args:
        model: whose weights take the factors up.
        maxima: of :func:`channel_maxima`.
        alpha: 0 leaves the activations as they are large, 1 makes all channels equally large.
        limit: what a channel may be after that, in multiples of the one that :data:`USUAL` names; None for anything.
    """
    factors: dict[Site, FloatArray] = {}
    for site in absorbers(model.family, model.spec):
        weight = torch.stack([linear.weight.detach().abs().amax(dim=0) for linear in model.sites[site]]).amax(dim=0)
        seen = maxima[site][maxima[site] > 0].astype(np.float64)
        usual = np.quantile(seen, USUAL) if seen.size else 1.0
        x = np.maximum(maxima[site].astype(np.float64), QUIET * usual)
        w = np.maximum(weight.numpy().astype(np.float64), SMALLEST)
        factor = x**alpha / w ** (1 - alpha)
        if limit is not None:
            smoothed = x / factor
            known = smoothed[maxima[site] > 0] if seen.size else smoothed
            factor *= np.maximum(1.0, smoothed / (limit * np.quantile(known, USUAL)))
        factors[site] = factor.astype(np.float32)
    return Smoothing(factors, alpha, model.spec.weights_digest)
