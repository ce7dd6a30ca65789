"""Self-sink screen: run every vocabulary token alone at one position and measure its own activations.

A token can replace the sink only if it becomes a sink at its own position (METHOD section 3). That takes one position
per token instead of one text: V positions, not V * n. The screen only filters; the exact objective decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner

DEPTH_SAMPLE = 128
"""Random tokens that determine how many layers the screen has to run."""
DEPTH_AGREEMENT = 0.95
"""Required rank correlation of their maxima within those layers with their maxima within all layers."""


@torch.inference_mode()
def sink_depth(model: TorchRunner, rng: np.random.Generator) -> int:
    """Return the number of layers, from the first, within which a token that becomes a sink has become one.

    Sinks form in early layers (SmolLM2: the 12th of 30), the same ones whatever precedes them. So a random sample with
    nothing before it, where sinks form if the model has any, runs through all layers once, and the vocabulary only
    through as many as the ranking of the sample needs.
    """
    vocabulary, layers = model.spec.vocab_size, model.spec.num_layers
    sample = model.tensor(rng.choice(vocabulary, size=min(DEPTH_SAMPLE, vocabulary), replace=False))
    return _depth_needed(_layer_maxima(model, [], sample, layers))


@torch.inference_mode()
def self_sink_sizes(
    model: TorchRunner,
    past: KeysValues,
    depth: int,
    *,
    batch_positions: int = 2048,
    progress: Progress = silent,
) -> FloatArray:
    """Return for every token, placed after ``past``, its largest Site activation in the first ``depth`` layers.

    Args:
        model: the model.
        past: keys and values of the prefix so far.
        depth: layers to run.
        batch_positions: tokens per forward pass, which bounds memory.
        progress: where to report the number of tokens done.

    Returns:
        float32 ``[vocab]``.
    """
    vocabulary = model.spec.vocab_size
    sizes = np.empty(vocabulary, dtype=np.float32)
    for start in range(0, vocabulary, batch_positions):
        ids = model.arange(start, min(start + batch_positions, vocabulary))
        sizes[start : start + len(ids)] = model.array(_layer_maxima(model, past, ids, depth).amax(dim=0))
        progress("screening the vocabulary", start + len(ids), vocabulary)
    return sizes


def _depth_needed(maxima: Tensor) -> int:
    """Return the fewest layers whose maxima ``[layers, tokens]`` rank the tokens as those of all layers do."""
    ranks = maxima.cummax(dim=0).values.argsort(dim=1).argsort(dim=1).double()
    for depth in range(1, len(maxima)):
        if torch.corrcoef(torch.stack([ranks[depth - 1], ranks[-1]]))[0, 1] >= DEPTH_AGREEMENT:
            return depth
    return len(maxima)


def _layer_maxima(model: TorchRunner, past: KeysValues, ids: Tensor, depth: int) -> Tensor:
    """Return the largest Site activation of each token in each layer, ``[depth, tokens]``."""
    found = model.zeros(depth, len(ids))
    sites = {site: linears for site, linears in model.sites.items() if _layer_of(site, depth) is not None}

    def keep(site: Site, x: Tensor) -> None:
        layer = _layer_of(site, depth)
        if layer is not None:
            found[layer] = torch.maximum(found[layer], x.abs().amax(dim=(1, 2)))

    with observed(model, keep, sites), _truncated(model, depth):
        model.run(ids[:, None], past[:depth], head=False)
    return found


def _layer_of(site: Site, depth: int) -> int | None:
    parts = site.split(".")
    layer = int(parts[1]) if parts[0] == "layers" else None
    return layer if layer is not None and layer < depth else None


@contextmanager
def _truncated(model: TorchRunner, depth: int) -> Iterator[None]:
    """Make the model run only its first ``depth`` layers."""
    name, full = model.family.layers.rpartition(".")[2], model.layers
    setattr(model.decoder, name, full[:depth])
    try:
        yield
    finally:
        setattr(model.decoder, name, full)
