"""Optimization profiles of a TensorRT plan: which shapes of a call it admits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CACHE = "past_key_values.0.key"
"""Stands for all caches, which are alike."""


@dataclass(frozen=True)
class Profile:
    """What one optimization profile of a plan admits.

    Attributes:
        index: in the plan.
        name: ``decode`` where it takes single tokens, ``prefill`` otherwise.
        batch, sequence: largest B and S.
        past: smallest and largest length of the cache before a call, prefix slots included.
        capacity: slots of a static cache; 0 where it grows.
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
        """Say the limits."""
        return f"{self.name} takes a batch of {self.batch} and {self.sequence} new tokens after {self.past[1]}"


def read_profiles(engine: Any) -> tuple[Profile, ...]:
    """Return the optimization profiles of a plan, the narrowest first."""
    found = []
    capacity = max(0, engine.get_tensor_shape(CACHE)[2])  # -1 where the cache grows
    for index in range(engine.num_optimization_profiles):
        _, _, most = (tuple(dims) for dims in engine.get_tensor_profile_shape("input_ids", index))
        shortest, _, longest = (tuple(dims) for dims in engine.get_tensor_profile_shape(CACHE, index))
        name = "decode" if most[1] == 1 else "prefill"
        past = (0, capacity - 1) if capacity else (shortest[2], longest[2])
        found.append(Profile(index, name, most[0], most[1], past, capacity))
    return tuple(sorted(found, key=lambda profile: profile.sequence))
