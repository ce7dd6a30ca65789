"""Where a smoothing goes: which tensor of a model takes up which factor. Read by torch and by the exporter alike.

X W = (X / s) (s W) for every input channel. The division is folded into the norm or linear before the Site, the
product into the linears after it: the folded model computes the same function with the same operators.
"""

from __future__ import annotations

from cushion_deploy.errors import UsageError
from cushion_deploy.families import Family
from cushion_deploy.types import FloatArray, ModelSpec, Site, Smoothing, WeightSource, layer_site


def absorbers(family: Family, spec: ModelSpec) -> dict[Site, str]:
    """Return every Site that can be smoothed, with the path of the module that absorbs the division."""
    return {
        layer_site(i, rule.kind): f"{family.layer(i)}.{rule.absorber}"
        for i in range(spec.num_layers)
        for rule in family.sites
        if rule.absorber is not None
    }


class FoldedWeights:
    """The tensors of a model with the factors of a smoothing folded in, one at a time (a ``WeightSource``)."""

    def __init__(self, weights: WeightSource, family: Family, spec: ModelSpec, smoothing: Smoothing) -> None:
        """Work out which tensor is divided along its first axis and which is multiplied along its last.

        Raises:
            UsageError: the smoothing was measured on another model, or lacks a Site.
        """
        self._weights = weights
        self._divide: dict[str, FloatArray] = {}
        self._multiply: dict[str, FloatArray] = {}
        wanted = absorbers(family, spec)
        if smoothing.model_digest != spec.weights_digest or set(smoothing.factors) != set(wanted):
            raise UsageError(
                "the smoothing was measured on another model", hint="run `cushion-deploy calibrate` for this model"
            )
        names, linears = weights.names(), family.linears(spec, head=False)
        for site, absorber in wanted.items():
            factor = smoothing.factors[site]
            self._divide |= {f"{absorber}.{t}": factor for t in ("weight", "bias") if f"{absorber}.{t}" in names}
            self._multiply |= {f"{path}.weight": factor for path in linears[site]}

    @property
    def touched(self) -> frozenset[str]:
        """Names of the tensors that differ from the original."""
        return frozenset(self._divide.keys() | self._multiply.keys())

    def names(self) -> frozenset[str]:
        """Return every tensor name."""
        return self._weights.names()

    def get(self, name: str) -> FloatArray:
        """Return one tensor as float32."""
        tensor = self._weights.get(name)
        if name in self._multiply:
            tensor = tensor * self._multiply[name]
        if name in self._divide:
            divisor = self._divide[name]
            tensor = tensor / divisor.reshape(-1, *[1] * (tensor.ndim - 1))
        return tensor
