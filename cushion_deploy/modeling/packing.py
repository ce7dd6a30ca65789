"""Codes packed into 32-bit words, as compressed-tensors stores them: the first code in the lowest bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 32


@dataclass(frozen=True)
class Packing:
    """How a matrix of signed codes lies in words.

    Attributes:
        bits: of a code, 4 or 8; it is stored plus half of its range, so that it is not negative.
        axis: of the matrix, along which codes share words.
        size: codes along that axis; the last words may have room for more.
    """

    bits: int
    axis: int
    size: int

    @property
    def words(self) -> int:
        """Words along the axis."""
        return -(-self.size * self.bits // WORD)

    def unpack(self, words: Tensor) -> Tensor:
        """Return the codes, int32 ``[rows, columns]``, of words int32 with the same axes."""
        lines = words if self.axis == 1 else words.T
        mask = (1 << self.bits) - 1
        fields = torch.stack([(lines >> place) & mask for place in range(0, WORD, self.bits)], dim=-1)
        codes = fields.flatten(1)[:, : self.size] - (1 << (self.bits - 1))
        return codes if self.axis == 1 else codes.T
