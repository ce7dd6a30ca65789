"""Run only the first layers of a model: enough for what only filters candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from cushion_deploy.core.sites import HEAD_SITE, Site
from cushion_deploy.modeling.runner import TorchRunner


@contextmanager
def first_layers(model: TorchRunner, depth: int) -> Iterator[dict[Site, tuple[nn.Linear, ...]]]:
    """Make the model run only its first ``depth`` layers; yield the Sites within them, without that of the head."""
    name, full = model.family.layers.rpartition(".")[2], model.layers
    setattr(model.decoder, name, full[:depth])
    try:
        yield {s: linears for s, linears in model.sites.items() if s != HEAD_SITE and layer_of(s) < depth}
    finally:
        setattr(model.decoder, name, full)


def layer_of(site: Site) -> int:
    """Return the layer of a Site that is not the head's."""
    return int(site.split(".")[1])
