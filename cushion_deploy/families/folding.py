"""Fold a smoothing into weights: which tensor of a model absorbs what. Used by torch and by the exporter.

X W = (X / s) (s W) for every input channel. The division is folded into the norm or linear before the Site, the
multiplication into the linears after it: the folded model computes the same function with the same operators. The
weights after a Site that is rotated are rotated in the same way: X W = (X H) (H W), because H is its own inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.core.rotation import rotate, signs
from cushion_deploy.core.sites import Site, layer_site
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.core.weights import WeightSource
from cushion_deploy.errors import UsageError
from cushion_deploy.families import Absorber, Family


def absorbers(family: Family, spec: ModelSpec) -> dict[Site, Absorber]:
    """Return every Site that can be smoothed, with its absorber; paths start at the root of the model."""
    return {
        layer_site(i, rule.kind): replace(rule.absorber, path=f"{family.layer(i)}.{rule.absorber.path}")
        for i in range(spec.num_layers)
        for rule in family.sites
        if rule.absorber is not None and (spec.norm_first or not rule.absorber.norm)
    }


@dataclass(frozen=True)
class Fold:
    """What folding does to one tensor ``[out, ...]``: (tensor * multiplier + offset) / divisor - offset, then rotated.

    Attributes:
        multiplier: float32 ``[in]``; None to multiply by nothing.
        divisor: float32 ``[out]``; None to divide by nothing.
        offset: what a norm adds to its stored weight.
        rotation: block size of the rotation of the last axis; 0 for none.
    """

    multiplier: FloatArray | None = None
    divisor: FloatArray | None = None
    offset: float = 0.0
    rotation: int = 0

    def apply(self, tensor: Any, rows: slice, convert: Callable[[npt.NDArray[Any]], Any]) -> Any:
        """Return folded rows of the tensor: a numpy array or, with the same operations, a torch tensor.

        A rotation is computed, and returned, in float64, so that any library and device, with any order of summation,
        gets the same float32 weight from it.

        Args:
            tensor: rows of the tensor, float32.
            rows: which rows they are.
            convert: converts an array to the kind of ``tensor``.
        """
        if self.multiplier is not None:
            tensor = tensor * convert(self.multiplier)
        if self.divisor is not None:
            column = convert(self.divisor[rows]).reshape(-1, *[1] * (tensor.ndim - 1))
            tensor = (tensor + self.offset) / column - self.offset
        if self.rotation:
            wide = tensor * convert(np.ones(1))
            rotated = rotate(wide, self.rotation, lambda order: convert(signs(order).astype(np.float64)))
            tensor = rotated / convert(np.sqrt([float(self.rotation)]))
        return tensor


class FoldedWeights:
    """The tensors of a model with a smoothing folded in (a ``WeightSource``)."""

    def __init__(self, weights: WeightSource, family: Family, spec: ModelSpec, smoothing: Smoothing) -> None:
        """Determine which tensors are divided along their first axis, and multiplied or rotated along their last.

        Raises:
            UsageError: the factors were measured on another model, or a Site is missing or cannot be rotated.
        """
        self._weights = weights
        self._divide: dict[str, tuple[Absorber, FloatArray]] = {}
        self._multiply: dict[str, FloatArray] = {}
        self._norm_offset = family.norm_offset
        wanted = absorbers(family, spec) if smoothing.factors else {}
        names, linears = weights.names(), family.linears(spec, head=False)
        foreign = smoothing.model_digest != spec.weights_digest or set(smoothing.factors) != set(wanted)
        if foreign or not set(smoothing.rotations) <= set(linears):
            raise UsageError(
                "the smoothing was measured on another model", hint="run `cushion-deploy calibrate` for this model"
            )
        self._rotate = {f"{path}.weight": b for site, b in smoothing.rotations.items() for path in linears[site]}
        for name, block in self._rotate.items():
            if weights.shape(name)[1] % block:
                raise UsageError(
                    f"{name} has {weights.shape(name)[1]} input features, which blocks of {block} do not divide",
                    hint="run `cushion-deploy calibrate` for this model",
                )
        for site, absorber in wanted.items():
            factor = smoothing.factors[site]
            for name in (f"{absorber.path}.weight", f"{absorber.path}.bias"):
                if name in names:
                    self._divide[name] = absorber, factor
            self._multiply |= {f"{path}.weight": factor for path in linears[site]}

    @property
    def touched(self) -> frozenset[str]:
        """Names of the tensors that differ from the original."""
        return frozenset(self._divide.keys() | self._multiply.keys() | self._rotate.keys())

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._weights.shape(name)

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Return ``tensor[start:stop]`` as float32."""
        stored = self._weights.rows(name, start, stop)
        folded: FloatArray = self.fold(name).apply(stored, slice(start, stop), lambda array: array)
        return folded.astype(np.float32, copy=False)

    def fold(self, name: str) -> Fold:
        """Return what folding does to a tensor; nothing unless it is among :attr:`touched`."""
        multiplier, rotation = self._multiply.get(name), self._rotate.get(name, 0)
        if name not in self._divide:
            return Fold(multiplier, rotation=rotation)
        absorber, factor = self._divide[name]
        part, parts = absorber.part
        count = self.shape(name)[0]
        divisor = np.ones(count, dtype=np.float32)
        divisor[part * count // parts : (part + 1) * count // parts] = factor
        # A norm multiplies by its stored weight plus the offset.
        offset = self._norm_offset if absorber.norm and name.endswith(".weight") else 0.0
        return Fold(multiplier, divisor, offset, rotation)
