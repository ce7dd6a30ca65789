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
    """

    index: int
    name: str
    batch: int
    sequence: int
    past: tuple[int, int]

    @property
    def total(self) -> int:
        """Longest attention mask."""
        return self.past[1] + self.sequence

    def admits(self, batch: int, sequence: int, past: int) -> bool:
        """Return whether a call fits."""
        return batch <= self.batch and sequence <= self.sequence and self.past[0] <= past <= self.past[1]

    def __str__(self) -> str:
        """Say the limits."""
        return f"{self.name} takes a batch of {self.batch} and {self.sequence} new tokens after {self.past[1]}"


def read_profiles(engine: Any) -> tuple[Profile, ...]:
    """Return the optimization profiles of a plan, the narrowest first."""
    found = []
    for index in range(engine.num_optimization_profiles):
        _, _, most = (tuple(dims) for dims in engine.get_tensor_profile_shape("input_ids", index))
        shortest, _, longest = (tuple(dims) for dims in engine.get_tensor_profile_shape(CACHE, index))
        name = "decode" if most[1] == 1 else "prefill"
        found.append(Profile(index, name, most[0], most[1], (shortest[2], longest[2])))
    return tuple(sorted(found, key=lambda profile: profile.sequence))
