"""Time what the stages of a build consist of, each on a little text, for the estimate of the doctor."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import MagnitudeHistogram, RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.schemes import PRECISIONS
from cushion_deploy.core.sites import Site
from cushion_deploy.modeling.past_key_values import KeysValues
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.modeling.sample import SAMPLE_TOKENS, step_seconds
from cushion_deploy.modeling.simulate import simulated
from cushion_deploy.modeling.teacher import Teacher
from cushion_deploy.prefix.floor import cannot_pay, floor_of
from cushion_deploy.prefix.objective import score_candidates, score_prefix
from cushion_deploy.prefix.screen import self_sink_sizes, sink_depth
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.base import Speed

REPEATS, LONG = 3, 0.3
"""Runs of a short action, and the seconds from which an action is long enough to be timed once."""
SCREENED, SCORED, SCORED_TOKENS = 1024, 16, 64
"""Tokens to screen; candidates to score, and tokens of text behind each."""


@dataclass(frozen=True)
class SpeedProbe:
    """Times one model.

    Attributes:
        model: the model.
        windows: text int64 ``[count, length]``.
        recipe: its sections ``search`` and ``calibration`` say what a build does.
    """

    model: TorchRunner
    windows: IntArray
    recipe: Recipe

    def speed(self) -> Speed:
        """Return the seconds of every part on this machine, at this moment."""
        model, windows = self.model, self.windows[:1]
        none = Prefix.empty(model.spec)
        batches, past = model.batches(windows, None, 1), model.past(none)
        layers = self._median(lambda: model.sweep(batches, past)) / windows.size
        teacher = Teacher(model, none)
        teacher.remember(windows)
        compared = self._median(lambda: teacher.compare(model, none, windows)) / windows.size
        everything = np.ones_like(windows)
        histograms: dict[Site, MagnitudeHistogram] = {}
        observed = self._median(lambda: histograms.update(observe_sites(model, none, windows, everything)))
        depth = sink_depth(model, np.random.default_rng([self.recipe.seed, 2]))
        quantized, swap = self._simulated(teacher, windows, histograms)
        return Speed(
            spec=model.spec,
            layers=layers,
            compared=compared,
            observed=observed / windows.size,
            quantized=quantized,
            swap=swap,
            scored=self._scored(),
            screened=self._screened(depth),
            depth=depth / model.spec.num_layers,
            decode_step=step_seconds(model, SAMPLE_TOKENS // 2),
            search_steps=self._search_steps(),
            weights=model.placed.resident_bytes,
            on_cpu=model.device.type == "cpu",
        )

    def _simulated(
        self, teacher: Teacher, windows: IntArray, histograms: dict[Site, MagnitudeHistogram]
    ) -> tuple[float, float]:
        """Return the seconds of a compared position through the fake-quantized model, and of quantizing the weights."""
        model, none = self.model, Prefix.empty(self.model.spec)
        config = self.recipe.calibration
        ranges = RangeEstimator(config.estimator, config.percentile)
        scales = choose_scales(histograms, ranges, model.lineage(none), windows[:1].size)
        begin = time.perf_counter()
        with simulated(model, PRECISIONS["w8a8"], scales):
            entered = time.perf_counter()
            quantized = self._median(lambda: teacher.compare(model, none, windows)) / windows.size
            left = time.perf_counter()
        return quantized, entered - begin + time.perf_counter() - left

    def _scored(self) -> float:
        text, tokens = self.windows[0, :SCORED_TOKENS], self.model.vocabulary[:SCORED].tolist()
        objective = self.recipe.search.objective
        seconds = self._median(lambda: score_candidates(self.model, KeysValues(), text, tokens, objective))
        return seconds / (len(tokens) * (len(text) + 1))

    def _screened(self, depth: int) -> float:
        """Return the seconds of a token through all layers, alone in its row."""
        tokens = self.model.vocabulary[:SCREENED]
        seconds = self._median(lambda: self_sink_sizes(self.model, KeysValues(), tokens, depth))
        return seconds / len(tokens) * self.model.spec.num_layers / depth

    def _search_steps(self) -> int:
        """Return the number of steps that a search probably runs: none if no token can pay."""
        search, text = self.recipe.search, self.windows[0]
        before = score_prefix(self.model, KeysValues(), text, search.objective, bits=search.bits)
        left = floor_of(self.model, KeysValues(), text, search.objective, before, bits=search.bits)
        return int(not cannot_pay(left, search.tau))

    def _median(self, action: Callable[[], object]) -> float:
        """Return the seconds of an action: of its first run if that is long, else the median of the runs after it."""
        times: list[float] = []
        while not times or (times[0] < LONG and len(times) <= REPEATS):
            begin = time.perf_counter()
            action()
            self.model.wait()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:] or times)
