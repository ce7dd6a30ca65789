"""What the weights of a module are at a moment: the smoothing folded into them, and which of them are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.families.folding import FoldedWeights


@dataclass(frozen=True)
class WeightFormat:
    """How a weight is quantized.

    Attributes:
        label: name of the weight in error messages.
        bits: bits of the codes.
        group: input features that share a scale; 0 for one scale per output channel.
    """

    label: str
    bits: int = 8
    group: int = 0


@dataclass(frozen=True)
class WeightState:
    """What the weights of a module are at this moment.

    Attributes:
        smoothing: the smoothing that is folded in; None for none.
        folded: its folding.
        quantized: the quantized tensors by name.
    """

    smoothing: Smoothing | None = None
    folded: FoldedWeights | None = None
    quantized: Mapping[str, WeightFormat] = field(default_factory=dict)

    def has(self, smoothing: Smoothing | None) -> bool:
        """Return whether this smoothing is the one that is folded in."""
        if smoothing is self.smoothing:
            return True
        return smoothing is not None and self.smoothing is not None and smoothing.digest == self.smoothing.digest

    @property
    def touched(self) -> frozenset[str]:
        """Names of the tensors that folding changes."""
        return self.folded.touched if self.folded else frozenset()
