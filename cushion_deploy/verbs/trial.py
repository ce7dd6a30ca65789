"""Quantize a model on a little text and compare it with the original model: what static INT8 roughly costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cushion_deploy.calib.calibrate import choose_scales, observe_rotated, observe_sites
from cushion_deploy.calib.estimators import MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.progress import Progress
from cushion_deploy.core.scales import ActivationScales
from cushion_deploy.core.schemes import QuantScheme
from cushion_deploy.core.sites import Site
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.recipe import Recipe

EVERY = 3
"""One window in so many is judged; ranges come from the others."""
COSTLY = 0.05
"""Divergence (nats per token) above which a quantized model is no longer close to the original one."""

Histograms = dict[Site, MagnitudeHistogram]


@dataclass(frozen=True)
class Cost:
    """What a sample of text says about a quantized model.

    Attributes:
        tokens: number of scored tokens.
        fp, quantized: perplexity of the original and of the quantized model.
        divergence: mean KL divergence from the original model, nats per token.
        later: the same from position 16 on, which a prefix changes less; NaN if the windows are shorter.
    """

    tokens: int
    fp: float
    quantized: float
    divergence: float
    later: float

    @property
    def change(self) -> float:
        """Relative increase of the perplexity."""
        return self.quantized / self.fp - 1

    @property
    def distance(self) -> float:
        """What says how close the model is to the original: the divergence from position 16 on, where it is known."""
        return self.divergence if math.isnan(self.later) else self.later

    @property
    def costly(self) -> bool:
        """Whether the model is no longer close to the original; also if its divergence is not finite."""
        return not self.distance <= COSTLY

    def to_json(self) -> dict[str, float | None]:
        """Return a JSON-ready dict; what is not finite is null."""
        found = {
            "tokens": self.tokens,
            "fp": self.fp,
            "quantized": self.quantized,
            "change": self.change,
            "divergence": self.divergence,
            "kl_after_16": self.later,
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


@dataclass
class Trial:
    """Measures costs: every third window is judged, ranges come from the others.

    Attributes:
        model: the model.
        windows: text int64 ``[count, length]``, without the tokens that a family needs before every text.
        recipe: its sections ``calibration`` and ``export``.
        progress: receives progress.
        teacher: the original model on the judged windows.
        original: its losses on them.
    """

    model: TorchRunner
    windows: IntArray
    recipe: Recipe
    progress: Progress
    teacher: Teacher = field(init=False)
    original: TextScore = field(init=False)

    def __post_init__(self) -> None:
        # Now, because later the weights are quantized.
        self.teacher = Teacher(self.model)
        self.teacher.remember(self.judged, self.progress)
        self.original = TextScore(self.teacher.losses(self.judged))

    @property
    def calibrated(self) -> IntArray:
        """The windows that are observed."""
        found: IntArray = self.windows[np.arange(len(self.windows)) % EVERY != EVERY - 1]
        return found

    @property
    def judged(self) -> IntArray:
        """The windows that are judged."""
        return self.windows[EVERY - 1 :: EVERY]

    @property
    def scheme(self) -> QuantScheme:
        """The scheme of the recipe, with every Site quantized."""
        return self.recipe.scheme

    def same_as_without(self, prefix: Prefix) -> bool:
        """Return whether a prefix is what precedes every text anyway, and stays in sight anyway."""
        window, length = self.model.spec.smallest_window, prefix.length + self.windows.shape[1]
        return prefix.token_ids == self.model.bare_tokens and not 0 < window < length

    def observe(self, model: TorchRunner, prefix: Prefix) -> Histograms:
        """Return the histogram of every Site of a view of the model."""
        return observe_sites(model, prefix, *self._observed, progress=self.progress)

    def observe_rotated(
        self, model: TorchRunner, prefix: Prefix, rotations: Mapping[Site, int]
    ) -> tuple[Histograms, Histograms]:
        """Return the histogram of every Site as it is, and as rotations make it, from one pass."""
        return observe_rotated(model, prefix, *self._observed, rotations, progress=self.progress)

    def scales(self, histograms: Histograms, model: TorchRunner, prefix: Prefix) -> ActivationScales:
        """Return the scales that the recipe's estimator chooses."""
        config = self.recipe.calibration
        ranges = RangeEstimator(config.estimator, config.percentile)
        return choose_scales(histograms, ranges, model.lineage(prefix), self.calibrated.size)

    def cost(self, model: TorchRunner, prefix: Prefix, scales: ActivationScales, task: str) -> Cost:
        """Return the cost of a view of the model that is quantized with these scales."""
        with simulated(model, self.scheme, scales):
            found = self.teacher.compare(model, prefix, self.judged, self.progress, task)
        return Cost(
            found.losses.size,
            self.original.perplexity,
            TextScore(found.losses).perplexity,
            found.divergence,
            found.later.divergence,
        )

    @property
    def _observed(self) -> tuple[Any, Any]:
        return self.calibrated, np.ones_like(self.calibrated)
