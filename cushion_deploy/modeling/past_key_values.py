"""The key/value cache of one forward pass: constant states before the text, and whether the text's own are kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

KeysValues = list[tuple[Tensor, Tensor]]
"""Per layer: keys and values, each float32 ``[batch, kv_heads, length, head_dim]``, keys after rotation."""


class ConstantPast(DynamicCache):  # type: ignore[misc]
    """A cache that never grows: attention reads past and new states, and only the past is stored.

    A pass whose cache nobody reads then holds the states of one layer at a time, and a layer can be run twice
    (gradient checkpointing).
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return past and new keys and values of a layer, ``[batch, kv_heads, P + n, head_dim]``; store neither."""
        past = self.layers[layer_idx : layer_idx + 1]
        # Copied even where nothing comes before, so that the memory layout is that of a growing cache.
        keys = torch.cat([*(layer.keys for layer in past), key_states], dim=2)
        return keys, torch.cat([*(layer.values for layer in past), value_states], dim=2)


def new_cache(past: KeysValues, batch: int, *, keep: bool) -> DynamicCache:
    """Return a cache for one pass that begins with ``past`` in every row; ``past`` itself is never changed.

    Args:
        past: keys and values before the text, batch size 1 or ``batch``.
        batch: rows of the pass.
        keep: True for a cache that stores the states of the text, False for :class:`ConstantPast`.
    """
    kind = DynamicCache if keep else ConstantPast
    if length_of(past) == 0:
        return kind()
    return kind([(k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1)) for k, v in past])


def length_of(past: KeysValues) -> int:
    """Return the number of positions that ``past`` takes."""
    return past[0][0].shape[2] if past else 0


def keys_values(cache: DynamicCache) -> KeysValues:
    """Return what a cache stores."""
    return [(layer.keys, layer.values) for layer in cache.layers]
