"""Observe or replace the keys and values that enter the cache during a forward pass, whatever the model family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from cushion_deploy.core.kv_scales import KV_PARTS, KvPart
from cushion_deploy.modeling.runner import TorchRunner

Entering = Callable[[int, KvPart, Tensor], Tensor]
"""Layer, part, and keys (after rotation) or values ``[batch, kv_heads, length, head_dim]`` to what replaces them."""


class _WatchedCache(DynamicCache):  # type: ignore[misc]
    """Another cache, with a transform of the states that enter it."""

    def __init__(self, cache: DynamicCache, entering: Entering) -> None:
        """Share the layers of ``cache``."""
        self.__dict__.update(vars(cache))
        self._cache, self._entering = cache, entering

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Pass on what the transform returns, which attention then reads in place of the original states."""
        keys, values = (
            self._entering(layer_idx, part, states)
            for part, states in zip(KV_PARTS, (key_states, value_states), strict=True)
        )
        updated: tuple[Tensor, Tensor] = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        return updated


@contextmanager
def watched_cache(
    model: TorchRunner, entering: Entering, held: Callable[[DynamicCache], None] | None = None
) -> Iterator[None]:
    """Call ``entering`` on all keys and values before they enter the cache, in every forward pass.

    It works for every family, because every transformers model passes its keys and values to ``Cache.update``.

    Args:
        model: the model.
        entering: gets keys and values of new tokens; returns what is stored and attended to instead.
        held: called with the cache before each forward pass; may change what the cache already holds.
    """

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        # Without a cache, a model attends directly to the states that it computed: give it one to intercept them.
        cache = DynamicCache() if cache is None else cache
        if held is not None:
            held(cache)
        return args, {**kwargs, "past_key_values": _WatchedCache(cache, entering)}

    handle = model.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
