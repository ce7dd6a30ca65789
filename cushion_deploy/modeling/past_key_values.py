"""Key/value caches: that of one forward pass behind constant states, and one that many decode steps fill in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class KeysValues:
    """Keys and values before a text; by default none.

    Attributes:
        layers: per layer: keys and values, ``[batch, kv_heads, length, head_dim]`` of the model's type, keys after
            rotation.
        kept: number of positions, from the first on, that no sliding window closes: those of a prefix. Text that
            follows it in a cache is not among them.
    """

    layers: Sequence[tuple[Tensor, Tensor]] = ()
    kept: int = 0

    @property
    def length(self) -> int:
        """The number of positions."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def of_first(self, layers: int) -> KeysValues:
        """Return those of the first layers."""
        return replace(self, layers=self.layers[:layers])

    def before_candidate(self) -> KeysValues:
        """Return the same before a text whose first token is to become part of the prefix, and so is kept as well."""
        return replace(self, kept=self.length + 1)


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


class ReservedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a cache for ``capacity`` positions, allocated once: a step writes its own states and copies none."""

    def __init__(self, capacity: int) -> None:
        """Begin empty; the first states decide batch, heads, type and device."""
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate room for keys and values like these."""
        super().lazy_initialization(key_states, value_states)
        self.room = [
            states.new_empty(*states.shape[:2], self.capacity, states.shape[3]) for states in (key_states, value_states)
        ]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append states and return views of all so far, ``[batch, kv_heads, length, head_dim]``."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        begin, self.length = self.length, self.length + key_states.shape[2]
        for room, states in zip(self.room, (key_states, value_states), strict=True):
            room.narrow(2, begin, states.shape[2]).copy_(states)
        self.keys, self.values = (room[:, :, : self.length] for room in self.room)
        return self.keys, self.values


def reserved_cache(layers: int, capacity: int) -> Cache:
    """Return an empty cache with room for ``capacity`` positions in each layer.

    It holds every position, and the masks of sliding-window layers close those beyond the window.
    """
    return Cache(layers=[ReservedLayer(capacity) for _ in range(layers)])


def new_cache(past: KeysValues, batch: int, *, keep: bool) -> DynamicCache:
    """Return a cache for one pass that begins with ``past`` in every row; ``past`` itself is never changed.

    Args:
        past: what comes before the text, batch size 1 or ``batch``.
        batch: rows of the pass.
        keep: True for a cache that stores the states of the text, False for :class:`ConstantPast`.
    """
    rows = [tuple(states.expand(batch, -1, -1, -1) for states in layer) for layer in past.layers if past.length]
    if keep:
        return DynamicCache(rows) if rows else DynamicCache()
    cache = ConstantPast()
    for keys, values in rows:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        # Views: many caches may exist at once, and a pass copies what it reads.
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def keys_values(cache: DynamicCache, kept: int = 0) -> KeysValues:
    """Return what a cache stores, the first ``kept`` positions of it a prefix."""
    return KeysValues([(layer.keys, layer.values) for layer in cache.layers], kept)
