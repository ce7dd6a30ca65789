"""Smoothing of Site inputs: how much of each channel's magnitude moves into the weights, and what is rotated.

s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for every input channel j (Xiao et al., 2023, Eq. 4). Behind a prefix, weak
sinks remain (articles and spaces, 20 times the other tokens) in one or two channels of a down projection. Alpha would
have to be near 1 to reduce them, but then every channel fills its range, and text other than the calibration text is
clipped. So only the few largest channels are divided down to a limit, and the others keep their headroom.

What remains at a down projection are isolated spikes, of single tokens in single channels, which no factor of a channel
can flatten. A rotation spreads each over a block of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.rotation import rotation_block
from cushion_deploy.core.sites import Site, layer_site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.families.folding import absorbers
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import SmoothQuant

SMALLEST = 1e-5
"""Lower bound of a weight's magnitude, so that a channel whose weights are all zero has a finite factor."""
USUAL = 0.9
"""Quantile of the channel maxima that other channels are compared with, over channels that calibration saw."""
QUIET = 0.02
"""Lower bound of a channel's maximum, relative to that quantile. A channel that calibration hardly saw, such as one
behind a ReLU that did not fire, would otherwise be scaled up to the others, and clipped when it does fire."""


@dataclass
class ChannelMaxima:
    """The largest magnitude of each input channel of every Site, over the text tokens of all passes so far."""

    model: TorchRunner
    found: dict[Site, Tensor] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one batch ``[batch, length, features]``; padding does not count."""
        text = self.model.current.mask
        largest = (x.flatten(0, 1) if text is None else x[text.bool()]).abs().amax(dim=0).float()
        self.found[site] = torch.maximum(self.found[site], largest) if site in self.found else largest

    def of_all_processes(self) -> dict[Site, FloatArray]:
        """Return Site to float32 ``[features]``; zeros for a Site that was not seen."""
        found, model = self.found, self.model
        nothing = {site: np.zeros(linears[0].in_features, dtype=np.float32) for site, linears in model.sites.items()}
        own = {site: model.array(found[site]) if site in found else zeros for site, zeros in nothing.items()}
        return {site: model.reduced(value, "max") for site, value in own.items()}


@torch.inference_mode()
def channel_maxima(
    model: TorchRunner, prefix: Prefix, ids: IntArray, mask: IntArray, *, batch: int = 4, progress: Progress = silent
) -> dict[Site, FloatArray]:
    """Return the largest magnitude of each input channel of every Site, over text tokens behind the prefix.

    Args:
        model: the model.
        prefix: precedes every window and is not observed.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        batch: windows per forward pass.
        progress: where to report the number of windows done.

    Returns:
        Site to float32 ``[features]``.
    """
    batches, found = model.batches(ids, mask, batch), ChannelMaxima(model)
    with observed(model, found):
        model.sweep(batches, model.past(prefix), progress=progress, task="measuring channels")
    return found.of_all_processes()


def choose_rotations(model: TorchRunner, config: SmoothQuant) -> dict[Site, int]:
    """Return the block size of the rotation of each Site that is rotated.

    The recipe sets the largest block of each kind of Sites; the block is the largest power of two up to it that divides
    the width.
    """
    inputs = dict.fromkeys(("attn.qkv", "mlp.gate_up", "mlp.up"), config.rotate_in)
    limits = {**inputs, "attn.out": config.rotate_out, "mlp.down": config.rotate_down}
    found: dict[Site, int] = {}
    for layer in range(model.spec.num_layers):
        for rule in model.family.sites:
            site = layer_site(layer, rule.kind)
            if block := rotation_block(model.sites[site][0].in_features, limits[rule.kind]):
                found[site] = block
    return found


def choose_factors(
    model: TorchRunner,
    maxima: Mapping[Site, FloatArray],
    alpha: float,
    limit: float | None = None,
    rotations: Mapping[Site, int] = MappingProxyType({}),
) -> Smoothing:
    """Return the factors of every Site of the model that has an absorber, and the given rotations.

    Args:
        model: the model that the factors are for.
        maxima: result of :func:`channel_maxima`.
        alpha: 0 moves nothing into the weights, 1 makes all channels equally large.
        limit: the largest smoothed channel, in multiples of the quantile :data:`USUAL`; None for no limit.
        rotations: result of :func:`choose_rotations`.
    """
    factors: dict[Site, FloatArray] = {}
    for site in absorbers(model.family, model.spec):
        weight = torch.stack([w.abs().amax(dim=0).float() for w in model.weights_of(site)]).amax(dim=0)
        seen = maxima[site][maxima[site] > 0].astype(np.float64)
        usual = np.quantile(seen, USUAL) if seen.size else 1.0
        x = np.maximum(maxima[site].astype(np.float64), QUIET * usual)
        w = np.maximum(model.array(weight).astype(np.float64), SMALLEST)
        factor = x**alpha / w ** (1 - alpha)
        if limit is not None:
            smoothed = x / factor
            known = smoothed[maxima[site] > 0] if seen.size else smoothed
            factor *= np.maximum(1.0, smoothed / (limit * np.quantile(known, USUAL)))
        factors[site] = factor.astype(np.float32)
    return Smoothing(factors, alpha, model.digest, rotations)


def choose_smoothing(
    model: TorchRunner,
    prefix: Prefix,
    ids: IntArray,
    mask: IntArray,
    config: SmoothQuant,
    *,
    batch: int = 4,
    progress: Progress = silent,
) -> Smoothing:
    """Return the smoothing that a recipe asks for, measured behind a prefix.

    Args:
        model: the model.
        prefix: precedes every window and is not observed.
        ids, mask: int64 ``[windows, window]``; mask 0 on padding.
        config: the recipe's section ``smoothing``.
        batch: windows per forward pass.
        progress: where to report the number of windows done.
    """
    if config.alpha is None:
        return smoothing_from(model, {}, config)
    return smoothing_from(model, channel_maxima(model, prefix, ids, mask, batch=batch, progress=progress), config)


def smoothing_from(model: TorchRunner, maxima: Mapping[Site, FloatArray], config: SmoothQuant) -> Smoothing:
    """Return the smoothing that a recipe asks for, from channel maxima; without SmoothQuant they are not read."""
    rotations = choose_rotations(model, config)
    if config.alpha is None:
        return Smoothing({}, None, model.digest, rotations)
    return choose_factors(model, maxima, config.alpha, config.limit, rotations)
