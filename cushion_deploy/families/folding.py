"""Fold smoothing factors: which tensor of a model absorbs which factor. Used by torch and by the exporter.

X W = (X / s) (s W) for every input channel. The division is folded into the norm or linear before the Site, the
multiplication into the linears after it: the folded model computes the same function with the same operators.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.model_spec import ModelSpec
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


class FoldedWeights:
    """The tensors of a model with smoothing factors folded in (a ``WeightSource``)."""

    def __init__(self, weights: WeightSource, family: Family, spec: ModelSpec, smoothing: Smoothing) -> None:
        """Determine which tensors are divided along their first axis and which are multiplied along their last.

        Raises:
            UsageError: the factors were measured on another model, or a Site is missing.
        """
        self._weights = weights
        self._divide: dict[str, tuple[Absorber, FloatArray]] = {}
        self._multiply: dict[str, FloatArray] = {}
        self._norm_offset = family.norm_offset
        wanted = absorbers(family, spec)
        if smoothing.model_digest != spec.weights_digest or set(smoothing.factors) != set(wanted):
            raise UsageError(
                "the smoothing was measured on another model", hint="run `cushion-deploy calibrate` for this model"
            )
        names, linears = weights.names(), family.linears(spec, head=False)
        for site, absorber in wanted.items():
            factor = smoothing.factors[site]
            for name in (f"{absorber.path}.weight", f"{absorber.path}.bias"):
                if name in names:
                    self._divide[name] = absorber, factor
            self._multiply |= {f"{path}.weight": factor for path in linears[site]}

    @property
    def touched(self) -> frozenset[str]:
        """Names of the tensors that differ from the original."""
        return frozenset(self._divide.keys() | self._multiply.keys())

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._weights.shape(name)

    def rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Return ``tensor[start:stop]`` as float32."""
        tensor = self._weights.rows(name, start, stop)
        if name in self._multiply:
            tensor = tensor * self._multiply[name]
        if name in self._divide:
            absorber, factor = self._divide[name]
            # A norm multiplies by its stored weight plus the offset.
            offset = np.float32(self._norm_offset if absorber.norm and name.endswith(".weight") else 0)
            part, parts = absorber.part
            count = self.shape(name)[0]
            divisor = np.ones(count, dtype=np.float32)
            divisor[part * count // parts : (part + 1) * count // parts] = factor
            column = divisor[start:stop].reshape(-1, *[1] * (tensor.ndim - 1))
            tensor = (tensor + offset) / column - offset
        return tensor
