"""Where the damage of a scheme is done: the divergence if only one kind of Sites is quantized, and its worst Sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.fakequant import quantize_codes
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import quantized_sites, simulated
from cushion_deploy.modeling.teacher import Teacher

WORST = 3
"""Sites of the worst kind that are measured together."""


@dataclass(frozen=True)
class KindCosts:
    """Divergences from the original model, in nats per token, with everything else in floating point.

    Attributes:
        kinds: kind of Sites to the divergence if only these are quantized, the worst first.
        worst: Sites of the worst kind that lose most, with what they lose of an average token's input (squared error
            over squared magnitude), the worst first.
        together: the divergence if only ``worst`` is quantized.
    """

    kinds: Mapping[str, float]
    worst: tuple[tuple[Site, float], ...]
    together: float


@dataclass
class TokenLoss:
    """Measures what static scales lose of the input of Sites, as the mean over tokens.

    The share of each token counts once: in a sum over tokens, the error of the others would vanish behind a sink.
    """

    model: TorchRunner
    scales: Mapping[Site, float]
    found: dict[Site, list[float]] = field(default_factory=dict)

    def __call__(self, site: Site, x: Tensor) -> None:
        """Add one batch ``[batch, length, features]``."""
        scale = self.model.tensor(self.scales[site]).float()
        wrong = (quantize_codes(x, scale) * scale - x.float()).square().sum(-1)
        whole = x.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        self.found.setdefault(site, []).append(float((wrong / whole).mean()))

    def means(self) -> dict[Site, float]:
        """Return the mean of each Site."""
        return {site: sum(values) / len(values) for site, values in self.found.items()}


def kind_of(site: Site) -> str:
    """Return the kind of a Site, such as ``mlp.down``; ``head`` is its own."""
    return str(site) if site == HEAD_SITE else site.split(".", 2)[2]


@torch.inference_mode()
def kind_costs(
    model: TorchRunner,
    prefix: Prefix,
    scheme: QuantScheme,
    scales: ActivationScales,
    windows: IntArray,
    progress: Progress = silent,
) -> KindCosts:
    """Measure every kind of Sites that a static symmetric scheme quantizes, and the worst Sites of the worst kind.

    Args:
        model: the model.
        prefix: precedes every window.
        scheme: the scheme.
        scales: its activation scales.
        windows: text int64 ``[count, length]``.
        progress: where to report the passes done.
    """
    teacher = Teacher(model)
    teacher.remember(windows)
    sites = quantized_sites(model, scheme)
    kinds: dict[str, list[Site]] = {}
    for site in sites:
        kinds.setdefault(kind_of(site), []).append(site)
    steps = scales.of(sites)

    def divergence(only: list[Site], watch: Callable[[Site, Tensor], None] | None = None) -> float:
        others = tuple(site for site in sites if site not in only)
        # Watched before the input is replaced by its codes.
        watched = {site: sites[site] for site in only if site != HEAD_SITE}
        with (
            observed(model, watch, watched) if watch else nullcontext(),
            simulated(model, replace(scheme, float_sites=others), scales),
        ):
            return teacher.compare(model, prefix, windows).divergence

    found: dict[str, float] = {}
    lost: dict[str, dict[Site, float]] = {}
    for done, (kind, own) in enumerate(kinds.items()):
        progress("quantizing one kind of Sites at a time", done, len(kinds) + 1)
        loss = TokenLoss(model, steps)
        found[kind] = divergence(own, loss)
        lost[kind] = loss.means()
    order = sorted(found, key=lambda kind: -found[kind])
    progress("quantizing one kind of Sites at a time", len(kinds), len(kinds) + 1)
    shares = lost[order[0]]
    chosen = sorted(shares, key=lambda site: -shares[site])[:WORST]
    together = divergence(chosen) if chosen else found[order[0]]
    progress("quantizing one kind of Sites at a time", len(kinds) + 1, len(kinds) + 1)
    return KindCosts({kind: found[kind] for kind in order}, tuple((site, shares[site]) for site in chosen), together)
