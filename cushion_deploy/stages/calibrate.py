"""Calibrate: static activation scales and INT8 cache scales, from the calibration text behind a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from cushion_deploy.core.artifacts import SCALES_FILE, read_kv_scales, read_scales, write_kv_scales, write_scales
from cushion_deploy.core.kv_scales import KV_SCALES_FILE, KvGranularity, KvScales
from cushion_deploy.core.scales import ActivationScales, Estimator
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.stages.base import Node, Part
from cushion_deploy.stages.observation import Observation
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import calibrated_rows
from cushion_deploy.store.json_files import read_json, write_json

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

AMAX = "amax.json"


@dataclass(frozen=True)
class CalibratedScales:
    """Activation scales, and the largest magnitude observed at each Site."""

    scales: ActivationScales
    amax: dict[str, float]


@dataclass(frozen=True)
class Calibrate(Observation[CalibratedScales]):
    """Choose the static activation scale of every Site.

    Attributes:
        smoothing: factors to fold into the model first; None for no smoothing.
        estimator, percentile: the range estimator.
        bits, symmetric: format of the codes; deployable codes are symmetric with 8 bits.
    """

    name: ClassVar[str] = "calibrate"
    version: ClassVar[int] = 3
    shared: ClassVar[bool] = True
    smoothing: Node[Smoothing] | None
    estimator: Estimator
    percentile: float
    bits: int = 8
    symmetric: bool = True

    @property
    def scales(self) -> Node[ActivationScales]:
        """The scales without the magnitudes."""
        return Part(self, "scales")

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the scales and the largest magnitudes."""
        from cushion_deploy.calib.calibrate import choose_scales, observe_sites
        from cushion_deploy.calib.estimators import RangeEstimator

        model, prefix = folded(self.model, self.smoothing, inputs), inputs.get(self.prefix)
        ids, mask = self.observed_windows(inputs)
        rows = calibrated_rows(ids.shape[1])
        histograms = observe_sites(model, prefix, ids, mask, batch_size=rows, progress=inputs.progress)
        scales = choose_scales(
            histograms,
            RangeEstimator(self.estimator, self.percentile),
            model.lineage(prefix, inputs.get(self.text).digest),
            int(mask.sum()),
            bits=self.bits,
            symmetric=self.symmetric,
        )
        write_scales(scales, out / SCALES_FILE)
        write_json(out / AMAX, {site: h.amax for site, h in histograms.items()})

    def read(self, folder: Path) -> CalibratedScales:
        """Return the scales and the largest magnitudes."""
        return CalibratedScales(read_scales(folder / SCALES_FILE), read_json(folder / AMAX))


@dataclass(frozen=True)
class CalibrateCache(Observation[KvScales]):
    """Choose the scales of an INT8 key/value cache.

    Attributes:
        smoothing: factors to fold into the model first; None for no smoothing.
        estimator, percentile: the range estimator.
        granularity: one scale per head, or one per layer.
        prefix_in_cache: whether the prefix is stored in the cache and therefore quantized as well.
    """

    name: ClassVar[str] = "calibrate-kv"
    version: ClassVar[int] = 4
    shared: ClassVar[bool] = True
    smoothing: Node[Smoothing] | None
    estimator: Estimator
    percentile: float
    granularity: KvGranularity
    prefix_in_cache: bool

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the scales."""
        from cushion_deploy.calib.estimators import RangeEstimator
        from cushion_deploy.calib.kv_cache import choose_kv_scales, observe_cache

        model, prefix = folded(self.model, self.smoothing, inputs), inputs.get(self.prefix)
        ids, mask = self.observed_windows(inputs)
        rows = calibrated_rows(ids.shape[1])
        scales = choose_kv_scales(
            observe_cache(model, prefix, ids, mask, self.granularity, batch_size=rows, progress=inputs.progress),
            RangeEstimator(self.estimator, self.percentile),
            self.granularity,
            prefix,
            model.lineage(prefix, inputs.get(self.text).digest),
            int(mask.sum()),
            with_prefix=self.prefix_in_cache,
        )
        write_kv_scales(scales, out / KV_SCALES_FILE)

    def read(self, folder: Path) -> KvScales:
        """Return the scales."""
        return read_kv_scales(folder / KV_SCALES_FILE)


def folded(model: Node[TorchRunner], smoothing: Node[Smoothing] | None, inputs: Inputs) -> TorchRunner:
    """Return the model with the smoothing factors folded in, or unchanged if there is no smoothing."""
    found = inputs.get(model)
    return found.folded(inputs.get(smoothing)) if smoothing else found
