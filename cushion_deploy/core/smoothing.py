"""SmoothQuant factors of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.sites import Site
from cushion_deploy.errors import UntrustedArtifact
from cushion_deploy.store.digests import digest_arrays


@dataclass(frozen=True)
class Smoothing:
    """Factors that divide the input channels of each Site and multiply the weights behind it (SmoothQuant).

    Attributes:
        factors: Site to float32 ``[features]``, positive; empty for no smoothing.
        alpha: migration strength, 0 to 1: the share of the difficulty that is moved into the weights.
        model_digest: weights digest of the model that the factors were measured on.
    """

    factors: Mapping[Site, FloatArray]
    alpha: float
    model_digest: str

    def __post_init__(self) -> None:
        for site, factor in self.factors.items():
            if not np.isfinite(factor).all() or (factor < np.finfo(np.float32).tiny).any():
                raise UntrustedArtifact(
                    f"Site {site}: a smoothing factor is not a positive normal number",
                    hint="run `cushion-deploy calibrate` again",
                )

    @property
    def lineage(self) -> Lineage:
        """The digest of the model."""
        return Lineage(model=self.model_digest)

    @property
    def digest(self) -> str:
        """SHA-256 of everything that a folded weight depends on; empty for no smoothing."""
        if not self.factors:
            return ""
        return digest_arrays([("model " + self.model_digest, np.zeros(0, np.float32)), *sorted(self.factors.items())])
