"""What hooks must know about the forward pass that is running."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class CurrentPass:
    """The forward pass that is running; one object per module, updated before each pass.

    Attributes:
        rows: batch size; some families give their linears batch and length as one axis.
        mask: int64 ``[rows, length]``, 0 on padding; None if nothing is padded.
    """

    rows: int = 1
    mask: Tensor | None = None

    def begin(self, rows: int, mask: Tensor | None) -> None:
        """Describe the pass that is about to run."""
        self.rows, self.mask = rows, mask

    def with_batch_axis(self, x: Tensor) -> Tensor:
        """Return ``x`` as ``[batch, length, features]``; OPT gives its MLP batch and length as one axis."""
        return x if x.dim() == 3 else x.reshape(self.rows, -1, x.shape[-1])
