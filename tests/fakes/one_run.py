"""One run of a recipe: its pipeline and a run on a work folder, as in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.core.quantization import Quantization
from cushion_deploy.core.sites import Site
from cushion_deploy.recipe import Recipe
from cushion_deploy.report import Report
from cushion_deploy.stages.base import Given
from cushion_deploy.stages.pipeline import Pipeline
from cushion_deploy.stages.quantization import AssembleQuantization
from cushion_deploy.stages.run import Run
from cushion_deploy.stages.sensitivity import Sensitivity
from cushion_deploy.store import StageStore
from cushion_deploy.verbs.build import build


@dataclass
class OneRun:
    """The pipeline of a recipe, and a run of it as in a process of its own."""

    pipeline: Pipeline
    run: Run

    @classmethod
    def of(cls, recipe: Recipe, work: Path) -> OneRun:
        return cls(Pipeline.of(recipe), Run(StageStore(work)))

    @property
    def model(self) -> Any:
        return self.run.get(self.pipeline.model)

    @property
    def quantization(self) -> Quantization:
        return self.run.get(self.pipeline.quantized.quantization)

    @property
    def costs(self) -> dict[Site, float]:
        """The cost of every Site, none kept in floating point."""
        pipeline, branch = self.pipeline, self.pipeline.quantized
        whole = AssembleQuantization(
            pipeline.prefix, Given(pipeline.scheme), branch.calibration.scales, branch.smoothing
        )
        return self.run.get(Sensitivity(pipeline.model, whole, pipeline.text))

    def build(self, output: Path) -> Report:
        return build(self.pipeline.recipe, self.run, output)
