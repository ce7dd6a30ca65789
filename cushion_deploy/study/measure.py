"""Measurements inside a model for a study: the input of the last block, and the distribution of attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.modeling.runner import TorchRunner


@torch.inference_mode()
def block_input(model: TorchRunner, prefix: Prefix, windows: IntArray, progress: Progress = silent) -> dict[str, float]:
    """Return the largest, 90th percentile and median magnitude at the input of the last block, for text tokens only.

    Args:
        model: the model.
        prefix: the prefix that precedes every window; its positions are excluded.
        windows: int64 ``[count, length]``; the three values are averaged over the windows.
    """
    found: list[list[float]] = []

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = model.array((args[0] if args else kwargs["hidden_states"]).abs().flatten())
        found.append([float(values.max()), *(float(q) for q in np.quantile(values, (0.9, 0.5)))])

    last = model.layers[-1]
    handle = last.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model.sweep(
            model.batches(windows, None, 1), model.past(prefix), progress=progress, task="input of the last block"
        )
    finally:
        handle.remove()
    top1, top10, median = np.mean(found, axis=0).tolist()
    return {"top1": top1, "top10": top10, "median": median}


@torch.inference_mode()
def attention_shares(model: TorchRunner, prefix: Prefix, ids: IntArray) -> list[dict[str, float]]:
    """Return for each layer the shares of attention on the prefix, on the first text token, and on all other tokens.

    The shares are averaged over heads and over the text tokens as queries. The first text token is excluded as a
    query: without a prefix it can only attend to itself.

    Args:
        model: the model; its attention weights are computed explicitly for this pass.
        prefix: the prefix that precedes the text.
        ids: the text, int64 ``[1, n]``, with at least two tokens.
    """
    with _open_attention(model.module):
        out = model.run(model.tensor(ids), model.past(prefix), head=False, output_attentions=True)
    return [
        _shares(layer, model.host(weights)[0, :, 1:], prefix.length) for layer, weights in enumerate(out.attentions)
    ]


def _shares(layer: int, weights: Tensor, prefix: int) -> dict[str, float]:
    """Return the shares from weights ``[heads, queries, prefix + n]``."""
    mean = weights.double().mean(dim=(0, 1))
    first = float(mean[prefix])
    return {
        "layer": layer,
        "prefix": float(mean[:prefix].sum()),
        "first": first,
        "rest": float(mean[prefix + 1 :].sum()),
    }


@contextmanager
def _open_attention(module: Any) -> Iterator[None]:
    """Switch the model to an attention implementation that returns its weights, and restore it on exit."""
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    try:
        yield
    finally:
        module.set_attn_implementation(before)
