"""Look at, or replace, the keys and values that enter the cache while the model runs, whatever its family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache

from cushion_deploy.core.kv_scales import KV_PARTS, KvPart
from cushion_deploy.modeling.load import LoadedModel

Entering = Callable[[int, KvPart, Tensor], Tensor]
"""Layer, part and new keys (after rotation) or values ``[batch, kv_heads, length, head_dim]`` to what is stored."""


class _WatchedCache(DynamicCache):  # type: ignore[misc]
    """The same cache as another one, its layers shared, behind a transform of what enters it."""

    def __init__(self, like: DynamicCache, entering: Entering) -> None:
        """Take over everything that ``like`` holds."""
        self.__dict__.update(vars(like))
        self._entering = entering

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what the transform returns; attention reads exactly what is stored."""
        keys, values = (
            self._entering(layer_idx, part, states)
            for part, states in zip(KV_PARTS, (key_states, value_states), strict=True)
        )
        stored: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return stored


@contextmanager
def watched_cache(
    model: LoadedModel, entering: Entering, held: Callable[[DynamicCache], None] | None = None
) -> Iterator[None]:
    """Put ``entering`` before the cache of every forward pass.

    Every transformers model hands its keys and values to ``Cache.update``, so no family is named here.

    Args:
        model: the model.
        entering: gets keys and values of new tokens, returns what is stored and attended to in their place.
        held: called with the cache before each forward pass, to change what it holds already.
    """

    def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        # Without a cache a model attends to what it just computed: give it one, so that this passes here too.
        cache = DynamicCache() if cache is None else cache
        if held is not None:
            held(cache)
        return args, {**kwargs, "past_key_values": _WatchedCache(cache, entering)}

    handle = model.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
