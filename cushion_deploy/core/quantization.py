"""Everything that makes a quantized model of a floating-point one: prefix, smoothing, scheme and scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cushion_deploy.core.kv_scales import KvScales
from cushion_deploy.core.lineage import Lineage
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.errors import UsageError
from cushion_deploy.store.digests import digest_json

_CALIBRATE = "run `cushion-deploy calibrate` for this model and prefix, and give all of its files"


@dataclass(frozen=True)
class Quantization:
    """A prefix, smoothing factors, a scheme and scales that belong together.

    Attributes:
        prefix: the prefix that precedes every text; may be empty.
        scheme: what is quantized, and which Sites stay in floating point.
        scales: static activation scales, calibrated with the prefix; None leaves activations in floating point.
        smoothing: factors folded into the weights; None for no smoothing.
        kv_scales: scales of an INT8 cache, calibrated with the prefix; None for a floating-point cache.

    Raises:
        UsageError: a part was made for another model, prefix, smoothing or text than the others.
    """

    prefix: Prefix
    scheme: QuantScheme
    scales: ActivationScales | None = None
    smoothing: Smoothing | None = None
    kv_scales: KvScales | None = None

    def __post_init__(self) -> None:
        of_model = {"model": self.prefix.model_digest}
        expected = {**of_model, "prefix": self.prefix.digest, "smoothing": self._digest(self.smoothing)}
        if self.smoothing:
            self.smoothing.lineage.require("the smoothing was measured on", _CALIBRATE, of_model)
        if self.scales:
            self.scales.lineage.require("the scales were calibrated under", _CALIBRATE, expected)
        if self.kv_scales:
            if self.scales:
                expected["text"] = self.scales.lineage.text
            self.kv_scales.lineage.require("the cache scales were calibrated under", _CALIBRATE, expected)

    @staticmethod
    def _digest(part: Smoothing | ActivationScales | KvScales | None) -> str:
        return part.digest if part else ""

    @property
    def static_scales(self) -> ActivationScales:
        """The activation scales; raises UsageError if activations are in floating point."""
        if self.scales is None:
            raise UsageError("the model has no activation scales", hint="run `cushion-deploy calibrate` first")
        return self.scales

    @property
    def lineage(self) -> Lineage:
        """The digests of the parts, and of the model."""
        return Lineage(
            model=self.prefix.model_digest,
            prefix=self.prefix.digest,
            smoothing=self._digest(self.smoothing),
            scheme=self.scheme.digest,
            scales=self._digest(self.scales),
            kv_scales=self._digest(self.kv_scales),
        )

    @property
    def digest(self) -> str:
        """SHA-256 over the digests of the parts."""
        return digest_json(self.lineage.to_json())

    @property
    def float_twin(self) -> Quantization:
        """The same model in floating point: same prefix and smoothing, no quantization."""
        return replace(self, scales=None, kv_scales=None)
