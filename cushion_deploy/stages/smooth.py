"""Smooth: SmoothQuant factors, measured on the calibration text behind a prefix, and rotations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from cushion_deploy.core.artifacts import SMOOTHING_FILE, read_smoothing, write_smoothing
from cushion_deploy.core.smoothing import Smoothing
from cushion_deploy.recipe import SmoothQuant
from cushion_deploy.stages.observation import Observation
from cushion_deploy.stages.run import Inputs
from cushion_deploy.stages.windows import calibrated_rows


@dataclass(frozen=True)
class Smooth(Observation[Smoothing]):
    """Choose the smoothing factors and the rotations.

    Attributes:
        config: the recipe's section ``smoothing``.
    """

    name: ClassVar[str] = "smooth"
    version: ClassVar[int] = 4
    shared: ClassVar[bool] = True
    config: SmoothQuant

    def run(self, inputs: Inputs, out: Path) -> None:
        """Write the factors and the rotations."""
        from cushion_deploy.calib.smooth import choose_smoothing

        model, (ids, mask) = inputs.get(self.model), self.observed_windows(inputs)
        rows = calibrated_rows(ids.shape[1])
        before = inputs.get(self.prefix)
        found = choose_smoothing(model, before, ids, mask, self.config, batch=rows, progress=inputs.progress)
        write_smoothing(found, out / SMOOTHING_FILE)

    def read(self, folder: Path) -> Smoothing:
        """Return the factors and the rotations."""
        return read_smoothing(folder / SMOOTHING_FILE)
