"""Run a loaded model behind a constant prefix: hidden states, logits, and per-token losses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.modeling.load import LoadedModel

KeysValues = list[tuple[Tensor, Tensor]]
"""Per layer: keys and values, each float32 ``[batch, kv_heads, length, head_dim]``, keys after rotation."""


def prefix_tensors(prefix: Prefix) -> KeysValues:
    """Return the prefix as tensors with batch size 1."""
    return [
        (torch.from_numpy(k)[None], torch.from_numpy(v)[None]) for k, v in zip(prefix.keys, prefix.values, strict=True)
    ]


def cache_of(past: KeysValues, batch: int) -> DynamicCache:
    """Return a fresh transformers cache that holds ``past`` for every row; ``past`` itself is never changed."""
    length = past[0][0].shape[2] if past else 0
    if length == 0:
        return DynamicCache()
    return DynamicCache([(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in past])


def run(model: LoadedModel, ids: Tensor, past: KeysValues, mask: Tensor | None = None, *, head: bool = True) -> Any:
    """Run ``ids`` int64 ``[batch, length]`` at the positions that follow ``past``.

    Args:
        model: the model.
        ids: text token ids.
        past: constant keys and values before the text, batch size 1.
        mask: int64 ``[batch, length]``, 0 on padding (left or right); None where there is none.
        head: whether to compute logits (``.logits``) or only hidden states (``.last_hidden_state``).

    Returns:
        The transformers output; ``past_key_values`` holds the prefix and the text.
    """
    length = past[0][0].shape[2] if past else 0
    module = model.module if head else model.module.base_model
    if mask is None:
        positions = torch.arange(length, length + ids.shape[1])[None]
        return module(input_ids=ids, past_key_values=cache_of(past, ids.shape[0]), position_ids=positions)
    positions = (mask.cumsum(1) - 1).clamp(min=0) + length
    full = torch.cat([mask.new_ones(ids.shape[0], length), mask], dim=1)
    return module(
        input_ids=ids, past_key_values=cache_of(past, ids.shape[0]), position_ids=positions, attention_mask=full
    )


@torch.inference_mode()
def compute_prefix(model: LoadedModel, token_ids: tuple[int, ...]) -> Prefix:
    """Return the Prefix whose keys and values the model itself computes for ``token_ids`` at positions 0..P-1."""
    if not token_ids:
        return Prefix.empty(model.spec)
    cache = run(model, torch.tensor([token_ids]), [], head=False).past_key_values
    keys = np.stack([layer.keys[0].numpy() for layer in cache.layers])
    values = np.stack([layer.values[0].numpy() for layer in cache.layers])
    return Prefix(token_ids, keys, values, model.spec.weights_digest)


@torch.inference_mode()
def logits(model: LoadedModel, ids: IntArray, prefix: Prefix) -> FloatArray:
    """Return logits float32 ``[batch, length, vocab]`` of ``ids`` int64 ``[batch, length]`` behind the prefix."""
    out: FloatArray = run(model, torch.from_numpy(ids), prefix_tensors(prefix)).logits.float().numpy()
    return out


@torch.inference_mode()
def token_nll(model: LoadedModel, ids: IntArray, prefix: Prefix) -> FloatArray:
    """Return the negative log likelihood (nats) of tokens 1.. of each row: ``[batch, length - 1]``."""
    tensor = torch.from_numpy(ids)
    scores = run(model, tensor, prefix_tensors(prefix)).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(scores.flatten(0, 1), tensor[:, 1:].flatten(), reduction="none")
    out: FloatArray = loss.reshape(ids.shape[0], -1).numpy()
    return out
