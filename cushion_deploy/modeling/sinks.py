"""Attention sinks: tokens that carry massive activations, and the Sites that they enter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner

SINK_RATIO = 20.0
"""A token is a sink where it enters a Site at this many times what the median token does."""


@dataclass(frozen=True)
class Sink:
    """A token that carries a massive activation.

    Attributes:
        position: in its window.
        token: its text.
        share: of the windows looked at that have a sink at this position.
        site: where it is largest, of all Sites.
        magnitude: there.
        times_median: the magnitude over that of the median token at the same Site.
    """

    position: int
    token: str
    share: float
    site: Site
    magnitude: float
    times_median: float


@torch.inference_mode()
def find_sinks(model: TorchRunner, windows: IntArray) -> tuple[tuple[Sink, ...], tuple[tuple[Site, float], ...]]:
    """Return the sinks of windows int64 ``[count, length]``, and the Sites that they enter with their ratios."""
    sites, sizes, ratios = token_sizes(model, KeysValues(), windows)
    strongest, where = ratios.max(dim=0)  # [windows, length]
    sinks = []
    for position in torch.nonzero((strongest >= SINK_RATIO).any(dim=0)).flatten().tolist():
        row = int(strongest[:, position].argmax())
        site = int(where[row, position])
        sinks.append(
            Sink(
                position,
                model.token_text(int(windows[row, position])),
                float((strongest[:, position] >= SINK_RATIO).float().mean()),
                sites[site],
                float(sizes[site, row, position]),
                float(strongest[row, position]),
            )
        )
    by_site = {site: float(r) for site, r in zip(sites, ratios.flatten(1).amax(dim=1), strict=True) if r >= SINK_RATIO}
    order = sorted(sinks, key=lambda sink: -sink.times_median)
    return tuple(order), tuple(sorted(by_site.items(), key=lambda entry: -entry[1]))


@torch.inference_mode()
def token_sizes(model: TorchRunner, past: KeysValues, windows: IntArray) -> tuple[list[Site], Tensor, Tensor]:
    """Return the Sites, the largest magnitude of every token there, and what multiple of the median token's that is.

    Both are ``[Sites, windows, length]``, of windows int64 ``[windows, length]`` behind ``past``.
    """
    batches = model.batches(windows, None, len(windows))
    sites = {site: linears for site, linears in model.sites.items() if site != HEAD_SITE}
    number = {site: i for i, site in enumerate(sites)}
    sizes = model.zeros(len(sites), *windows.shape, dtype=torch.float32)

    def keep(site: Site, x: Tensor) -> None:
        low, high = x.amin(dim=-1), x.amax(dim=-1)
        sizes[number[site]] = torch.maximum(-low, high)

    with observed(model, keep, sites):
        model.sweep(batches, past)
    sizes = model.reduce(sizes, "max")
    usual = sizes.flatten(1).median(dim=1).values.clamp(min=torch.finfo(torch.float32).tiny)
    return list(sites), sizes, sizes / usual[:, None, None]
