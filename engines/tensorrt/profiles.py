"""Optimization profiles of a plan: the shapes it is compiled for, and the calls that a compiled plan admits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.errors import UsageError

CACHE = "past_key_values.0.key"
"""One cache input; all of them have the same shape and type."""
WRITE_INDICES = "write_indices"
"""Input of a static cache: the slot of the first new token, int64 ``[batch]``."""
Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Shapes of one optimization profile: input name to (min, opt, max)."""


@dataclass(frozen=True)
class Limits:
    """Limits of the optimization profiles: those asked for, reduced to what the model has.

    Attributes:
        batch: largest batch.
        context: longest context in tokens, without the prefix.
        prefill: most prompt tokens in one call.
    """

    batch: int
    context: int
    prefill: int

    @classmethod
    def of(cls, options: CompileOptions, contract: GraphContract) -> Limits:
        """Return the limits of a compilation, reduced to the positions of the model.

        Raises:
            UsageError: a limit below 1, or a prefix that takes every position.
        """
        for name in ("max_batch", "max_context", "max_prefill"):
            if getattr(options, name) < 1:
                raise UsageError(f"{name} is {getattr(options, name)}", hint="give at least 1")
        context = min(options.max_context, (contract.cache_capacity or contract.max_positions) - contract.prefix_length)
        if context < 1:
            raise UsageError(
                f"a prefix of {contract.prefix_length} leaves nothing of {contract.max_positions} positions",
                hint="search a shorter prefix",
            )
        return cls(options.max_batch, context, min(options.max_prefill, context))


def profile_shapes(contract: GraphContract, limits: Limits) -> dict[str, Shapes]:
    """Return the shapes of the profiles ``prefill`` and ``decode``, in the order in which a plan is compiled with them.

    Prefill takes 1 to ``limits.prefill`` tokens after 0 to ``limits.context - 1`` past tokens, so that a prompt can be
    cut anywhere; decode takes one token. At each of min, opt and max every input satisfies past + sequence = total.
    A past begins with the prefix unless that is in the graph. A static cache always has its full capacity.
    """
    capacity = contract.cache_capacity

    def at(batch: int, sequence: int, past: int) -> dict[str, list[int]]:
        past += contract.prefix_slots
        cache = [batch, contract.num_kv_heads, capacity or past, contract.head_dim]
        layers = range(contract.num_layers)
        return {
            "input_ids": [batch, sequence],
            "attention_mask": [batch, capacity or past + sequence],
            "position_ids": [batch, sequence],
            **({WRITE_INDICES: [batch]} if capacity else {}),
            **{f"past_key_values.{i}.{part}": cache for i in layers for part in ("key", "value")},
        }

    def between(low: dict[str, Any], usual: dict[str, Any], high: dict[str, Any]) -> Shapes:
        return {name: (low[name], usual[name], high[name]) for name in low}

    last, batch, prefill = limits.context - 1, limits.batch, limits.prefill
    return {
        "prefill": between(at(1, 1, 0), at(1, prefill, 0), at(batch, prefill, last)),
        "decode": between(at(1, 1, 0), at(1, 1, last // 2), at(batch, 1, last)),
    }


def abridged(shapes: Shapes) -> Shapes:
    """Return the shapes of a profile with one entry, ``past_key_values``, in place of all caches."""
    others = {name: shape for name, shape in shapes.items() if not name.startswith("past_key_values.")}
    return {**others, "past_key_values": shapes[CACHE]}


@dataclass(frozen=True)
class Profile:
    """An optimization profile of a compiled plan, and the calls that it admits.

    Attributes:
        index: index in the plan.
        name: ``decode`` if it takes single tokens, ``prefill`` otherwise.
        batch, sequence: largest batch, most new tokens.
        past: smallest and largest length of the cache before a call, prefix slots included.
        capacity: slots of a static cache; 0 if the cache grows.
    """

    index: int
    name: str
    batch: int
    sequence: int
    past: tuple[int, int]
    capacity: int = 0

    @property
    def total(self) -> int:
        """Longest attention mask."""
        return self.capacity or self.past[1] + self.sequence

    def admits(self, batch: int, sequence: int, past: int) -> bool:
        """Return whether a call fits."""
        fits = not self.capacity or past + sequence <= self.capacity
        return fits and batch <= self.batch and sequence <= self.sequence and self.past[0] <= past <= self.past[1]

    def __str__(self) -> str:
        """Return the limits in words."""
        return f"{self.name} takes a batch of {self.batch} and {self.sequence} new tokens after {self.past[1]}"


def read_profiles(engine: Any) -> tuple[Profile, ...]:
    """Return the optimization profiles of an ``ICudaEngine``, fewest new tokens first."""
    found = []
    capacity = max(0, engine.get_tensor_shape(CACHE)[2])  # -1 if the cache grows
    for index in range(engine.num_optimization_profiles):
        _, _, most = (tuple(dims) for dims in engine.get_tensor_profile_shape("input_ids", index))
        shortest, _, longest = (tuple(dims) for dims in engine.get_tensor_profile_shape(CACHE, index))
        name = "decode" if most[1] == 1 else "prefill"
        past = (0, capacity - 1) if capacity else (shortest[2], longest[2])
        found.append(Profile(index, name, most[0], most[1], past, capacity))
    return tuple(sorted(found, key=lambda profile: profile.sequence))
