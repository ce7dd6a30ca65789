"""Quantize a model on a little text, with and without the remedies of a build: what static INT8 roughly costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.calib.smooth import choose_smoothing
from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.recipe import Recipe

EVERY = 4


@dataclass(frozen=True)
class Cost:
    """Perplexity on a sample of text, in floating point and in static W8A8."""

    tokens: int
    fp: float
    quantized: float

    @property
    def change(self) -> float:
        """Relative increase of the perplexity."""
        return self.quantized / self.fp - 1


@dataclass(frozen=True)
class Trial:
    """Measures costs: perplexities come from every fourth window, ranges from the others.

    Attributes:
        model: the model.
        windows: text int64 ``[count, length]``, without the tokens that a family needs before every text.
        recipe: its sections ``calibration`` and ``smoothing``.
        progress: receives progress.
    """

    model: TorchRunner
    windows: IntArray
    recipe: Recipe
    progress: Progress

    def floating(self) -> FloatArray:
        """Return the losses of the original model, float32 ``[windows, length - 1]``."""
        return self.model.token_nll(self._judged, self.model.no_prefix(), self.progress, "perplexity in floating point")

    def plain(self, floating: FloatArray) -> Cost:
        """Return the cost without a prefix and without other remedies."""
        return self._cost(self.model, self.model.no_prefix(), floating, "perplexity in static W8A8")

    def remedied(self, floating: FloatArray, prefix: Prefix) -> Cost:
        """Return the cost with a prefix and the recipe's smoothing."""
        model, ids = self.model, self._calibrated
        found = choose_smoothing(model, prefix, ids, np.ones_like(ids), self.recipe.smoothing, progress=self.progress)
        model = model.folded(found)
        return self._cost(model, prefix, floating, "perplexity of the default build")

    def _cost(self, model: TorchRunner, prefix: Prefix, floating: FloatArray, task: str) -> Cost:
        config, calibrated = self.recipe.calibration, self._calibrated
        histograms = observe_sites(model, prefix, calibrated, np.ones_like(calibrated), progress=self.progress)
        ranges = RangeEstimator(config.estimator, config.percentile)
        scales = choose_scales(histograms, ranges, model.lineage(prefix), calibrated.size)
        with simulated(model, PRECISIONS[self.recipe.precision], scales):
            quantized = TextScore(model.token_nll(self._judged, prefix, self.progress, task))
        return Cost(quantized.tokens, TextScore(floating).perplexity, quantized.perplexity)

    @property
    def _calibrated(self) -> IntArray:
        found: IntArray = self.windows[np.arange(len(self.windows)) % EVERY != EVERY - 1]
        return found

    @property
    def _judged(self) -> IntArray:
        return self.windows[EVERY - 1 :: EVERY]
