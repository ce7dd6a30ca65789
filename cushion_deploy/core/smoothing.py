"""How the inputs of Sites are made easier to quantize: SmoothQuant factors and rotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.store.digests import digest_arrays


@dataclass(frozen=True)
class Smoothing:
    """Factors that divide the input channels of Sites, then rotations of the inputs of some Sites.

    The weights behind a Site are multiplied by its factors, and rotated in the same way: the function stays the same.
    The module before a Site absorbs the division; a rotation is an operation of its own.

    Attributes:
        factors: Site to float32 ``[features]``, positive; empty for no SmoothQuant.
        alpha: migration strength of SmoothQuant, 0 to 1: the share of the difficulty that is moved into the weights;
            None without SmoothQuant.
        model_digest: weights digest of the model that the factors were measured on.
        rotations: Site to the block size of its rotation (:mod:`cushion_deploy.core.rotation`), a power of two.
    """

    factors: Mapping[Site, FloatArray]
    alpha: float | None
    model_digest: str
    rotations: Mapping[Site, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hint = "run `cushion-deploy calibrate` again"
        for site, factor in self.factors.items():
            if not np.isfinite(factor).all() or (factor < np.finfo(np.float32).tiny).any():
                raise UntrustedArtifact(f"Site {site}: a smoothing factor is not a positive normal number", hint=hint)
        for site, block in self.rotations.items():
            if block < 2 or block & (block - 1):
                raise UntrustedArtifact(f"Site {site}: a rotation of {block} is not a power of two", hint=hint)

    @property
    def lineage(self) -> Lineage:
        """The digest of the model."""
        return Lineage(model=self.model_digest)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a folded weight depends on; empty for no factors and no rotations."""
        if not self.factors and not self.rotations:
            return ""
        blocks = [(f"rotation {site}", np.array(block)) for site, block in sorted(self.rotations.items())]
        empty = np.zeros(0, np.float32)
        return digest_arrays([("model " + self.model_digest, empty), *sorted(self.factors.items()), *blocks])
