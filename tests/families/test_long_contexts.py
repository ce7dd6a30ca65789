"""Scales that were calibrated on short windows cover contexts four times as long, in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from cushion_deploy.calib.calibrate import choose_scales, observe_sites
from cushion_deploy.calib.estimators import RangeEstimator
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.fakequant import qmax
from cushion_deploy.core.prefix import Prefix
from cushion_deploy.core.sites import HEAD_SITE
from cushion_deploy.modeling.runner import TorchRunner

WINDOW = 11
"""With one token of prefix, what a sliding window of 12 just shows: calibration never sees beyond it."""
COVERED = 1.5
"""Of the range of a scale. Other text of the same length exceeds the largest value of this little text by up to 1.36;
a sink reaches 27 times the range and more."""


def test_scales_cover_contexts_four_times_as_long(
    planted: TorchRunner, plain_ids: IntArray, one_sided: IntArray, plant: Any
) -> None:
    prefix = planted.compute_prefix(plant.absorbers[:1])
    # Calibration sees tokens of one class as well, so that they are nothing new in the context.
    windows = np.concatenate([plain_ids[:330], one_sided[-22:]]).reshape(-1, WINDOW)
    histograms = observe_sites(planted, prefix, windows, np.ones_like(windows))
    scales = choose_scales(histograms, RangeEstimator("max"), planted.lineage(prefix), windows.size)
    context = one_sided[None, -4 * WINDOW :]

    def reached(before: Prefix) -> float:
        longer = observe_sites(planted, before, context, np.ones_like(context))
        return max(found.amax / (qmax(8) * scales.scales[site]) for site, found in longer.items() if site != HEAD_SITE)

    assert reached(prefix) <= COVERED
    # Where windows move past the prefix, the sink is back.
    lost = reached(replace(prefix, slides=True))
    assert (lost > COVERED) == bool(planted.spec.windows)
