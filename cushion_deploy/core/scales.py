"""Static per-tensor activation scales."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np

from cushion_deploy.core.fakequant import BITS
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UsageError, unknown_choice
from cushion_deploy.store.digests import digest_json

Estimator = Literal["max", "percentile", "mse"]

ESTIMATORS: tuple[Estimator, ...] = ("max", "percentile", "mse")


@dataclass(frozen=True)
class ActivationScales:
    """Static per-tensor activation scales, and the conditions under which they were calibrated.

    Attributes:
        scales: scale of each Site, a float32 value as a Python float.
        estimator: the range estimator.
        lineage: digests of the model, prefix, smoothing and calibration text.
        tokens: number of text tokens observed.
        zero_points: for asymmetric codes, the code of 0.0 at each Site, between 0 and 2^bits - 1; empty if symmetric.
        bits: width of the codes.
    """

    scales: Mapping[Site, float]
    estimator: Estimator
    lineage: Lineage
    tokens: int
    zero_points: Mapping[Site, int] = field(default_factory=dict)
    bits: int = 8

    def __post_init__(self) -> None:
        for site, scale in self.scales.items():
            if not math.isfinite(scale) or scale < float(np.finfo(np.float32).tiny):
                raise UsageError(
                    f"Site {site}: scale {scale!r} is not a positive normal number",
                    hint="check the calibration text and the model's weights: this input is constant or not finite",
                )
        if self.bits not in BITS:
            raise unknown_choice("number of bits of activation scales", str(self.bits), [str(b) for b in BITS])
        if self.zero_points and set(self.zero_points) != set(self.scales):
            odd = min(set(self.zero_points) ^ set(self.scales))
            raise UsageError(
                f"Site {odd} has only one of scale and zero point", hint="run `cushion-deploy calibrate` again"
            )
        for site, zero in self.zero_points.items():
            if not 0 <= zero < 2**self.bits:
                raise UsageError(
                    f"Site {site}: zero point {zero} is not a code of {self.bits} bits",
                    hint="run `cushion-deploy calibrate` again",
                )

    def of(self, sites: Iterable[Site]) -> dict[Site, float]:
        """Return the scales of these Sites; raises UsageError if one is missing."""
        wanted = list(sites)
        missing = [site for site in wanted if site not in self.scales]
        if missing:
            raise UsageError(
                f"no activation scale for Site {missing[0]} ({len(missing)} missing)",
                hint="run `cushion-deploy calibrate` for this model and scheme",
            )
        return {site: self.scales[site] for site in wanted}

    def moved(self, scales: Mapping[Site, float], prefix: Prefix) -> ActivationScales:
        """Return new scales with the same lineage but another prefix, as tuning produces them."""
        return replace(self, scales=dict(scales), lineage=replace(self.lineage, prefix=prefix.digest))

    @property
    def digest(self) -> str:
        """SHA-256 of the scales and the lineage."""
        return digest_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict; zero points and bits are written only if they are not the deployable ones."""
        data = {**asdict(self), "scales": dict(sorted(self.scales.items())), **self.lineage.to_scales()}
        del data["lineage"]
        data["zero_points"] = dict(sorted(self.zero_points.items()))
        if not self.zero_points:
            del data["zero_points"]
        if self.bits == 8:
            del data["bits"]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ActivationScales:
        """Rebuild from :meth:`to_json`."""
        d = {key: value for key, value in data.items() if not key.endswith("_digest")}
        d["lineage"] = Lineage.from_scales(data)
        d["scales"] = {Site(k): float(v) for k, v in d["scales"].items()}
        d["zero_points"] = {Site(k): int(v) for k, v in d.get("zero_points", {}).items()}
        return cls(**d)
