"""Smooth: SmoothQuant factors, measured on the calibration text behind a prefix."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cushion_deploy.core.artifacts import SMOOTHING_FILE, read_smoothing, write_smoothing
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.stages.observation import Observation
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import calibrated_rows


@dataclass(frozen=True)
class Smooth(Observation[Smoothing]):
    """Choose the smoothing factors.

    Attributes:
        alpha, limit: settings of the recipe's section ``smoothing``.
    """

    name: ClassVar[str] = "smooth"
    version: ClassVar[int] = 2
    shared: ClassVar[bool] = True
    alpha: float
    limit: float | None

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the factors."""
        from cushion_deploy.calib.smooth import channel_maxima, choose_factors

        model, (ids, mask) = inputs.get(self.model), self.observed_windows(inputs)
        rows = calibrated_rows(ids.shape[1])
        maxima = channel_maxima(model, inputs.get(self.prefix), ids, mask, batch=rows, progress=inputs.progress)
        write_smoothing(choose_factors(model, maxima, self.alpha, self.limit), out / SMOOTHING_FILE)

    def read(self, folder: Path) -> Smoothing:
        """Return the factors."""
        return read_smoothing(folder / SMOOTHING_FILE)
