"""Self-sink screen: run vocabulary tokens alone at one position and measure the activations of each.

A token can replace the sink only if it becomes a sink at its own position (METHOD section 3). That takes one position
per token instead of one text: V positions, not V * n. The screen only filters; the exact objective decides. So it may
also run a random part of a large vocabulary: many tokens serve about equally well.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.observe import observed
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.prefix.first_layers import first_layers, layer_of

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
    vocabulary, layers = model.vocabulary, model.spec.num_layers
    sample = rng.choice(vocabulary, size=min(DEPTH_SAMPLE, len(vocabulary)), replace=False)
    return _depth_needed(model.host(_layer_maxima(model, KeysValues(), sample, layers, DEPTH_SAMPLE)))


@torch.inference_mode()
def self_sink_sizes(
    model: TorchRunner,
    past: KeysValues,
    tokens: IntArray,
    depth: int,
    *,
    batch_positions: int = 2048,
    progress: Progress = silent,
) -> FloatArray:
    """Return for each token, placed after ``past``, its largest Site activation in the first ``depth`` layers.

    Args:
        model: the model.
        past: keys and values of the prefix so far.
        tokens: token ids int64 ``[n]``.
        depth: layers to run.
        batch_positions: tokens per forward pass, which bounds memory.
        progress: where to report the number of tokens done.

    Returns:
        float32 ``[n]``.
    """
    maxima = _layer_maxima(model, past, tokens, depth, batch_positions, progress)
    return model.array(maxima.amax(dim=0))


def tokens_to_screen(vocabulary: IntArray, count: int | None, rng: np.random.Generator) -> IntArray:
    """Return ``count`` of the token ids in ascending order, int64; all if None or if there are no more than that."""
    if count is None or count >= len(vocabulary):
        return vocabulary
    return np.sort(rng.choice(vocabulary, size=count, replace=False)).astype(np.int64)


def _depth_needed(maxima: Tensor) -> int:
    """Return the fewest layers whose maxima ``[layers, tokens]`` rank the tokens as those of all layers do."""
    ranks = maxima.cummax(dim=0).values.argsort(dim=1).argsort(dim=1).double()
    for depth in range(1, len(maxima)):
        if torch.corrcoef(torch.stack([ranks[depth - 1], ranks[-1]]))[0, 1] >= DEPTH_AGREEMENT:
            return depth
    return len(maxima)


def _layer_maxima(
    model: TorchRunner, past: KeysValues, tokens: IntArray, depth: int, batch: int, progress: Progress = silent
) -> Tensor:
    """Return the largest Site activation of each token in each layer, float32 ``[depth, tokens]``."""
    found = model.zeros(depth, len(tokens), dtype=torch.float32)
    batches = model.batches(tokens[:, None], None, batch)
    part = slice(0)

    def before(number: int) -> None:
        nonlocal part
        part = slice(number * batch, number * batch + len(batches[number].ids))

    def keep(site: Site, x: Tensor) -> None:
        values = x.flatten(1)
        low, high = values.amin(dim=1), values.amax(dim=1)
        row = found[layer_of(site), part]
        row.copy_(torch.maximum(row, torch.maximum(-low, high)))

    with first_layers(model, depth) as sites, observed(model, keep, sites):
        model.sweep(batches, past.of_first(depth), before=before, progress=progress, task="screening the vocabulary")
    return model.reduce(found, "max")
