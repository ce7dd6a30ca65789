"""Optimization profiles of a plan: prefill and decode, within the limits that were asked for and the model has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cushion_deploy.core.graphs import GraphContract
from cushion_deploy.engines.base import CompileOptions
from cushion_deploy.errors import UsageError

Shapes = Mapping[str, tuple[Sequence[int], Sequence[int], Sequence[int]]]
"""Shapes of an optimization profile: input name to smallest, optimal and largest."""


@dataclass(frozen=True)
class Limits:
    """What the optimization profiles admit, after the model's own limits.

    Attributes:
        batch: largest batch.
        context: longest context, without the prefix.
        prefill: longest piece of prompt in one call.
    """

    batch: int
    context: int
    prefill: int

    @classmethod
    def of(cls, options: CompileOptions, contract: GraphContract) -> Limits:
        """Return the limits of a compilation; positions that the model does not have are left out.

        Raises:
            UsageError: a limit below 1.
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


def profiles(contract: GraphContract, limits: Limits) -> dict[str, Shapes]:
    """Return the shapes of the optimization profiles ``prefill`` and ``decode``.

    Prefill takes 1 to ``limits.prefill`` tokens after 0 to ``limits.context - 1`` past ones, so that a prompt can
    be cut anywhere; decode takes one token. Every input keeps past + sequence = total at each of the three points.
    A past begins with the prefix where that is not in the graph. A static cache has its capacity at every point.
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
            **({"write_indices": [batch]} if capacity else {}),
            **{f"past_key_values.{i}.{part}": cache for i in layers for part in ("key", "value")},
        }

    def between(smallest: dict[str, Any], usual: dict[str, Any], largest: dict[str, Any]) -> Shapes:
        return {name: (smallest[name], usual[name], largest[name]) for name in smallest}

    last, batch, prefill = limits.context - 1, limits.batch, limits.prefill
    return {
        "prefill": between(at(1, 1, 0), at(1, prefill, 0), at(batch, prefill, last)),
        "decode": between(at(1, 1, 0), at(1, 1, last // 2), at(batch, 1, last)),
    }


def brief(shapes: Shapes) -> Shapes:
    """Return the shapes of a profile with one entry for the caches, which are all alike."""
    plain = {name: shape for name, shape in shapes.items() if not name.startswith("past_key_values.")}
    return {**plain, "past_key_values": shapes["past_key_values.0.key"]}
