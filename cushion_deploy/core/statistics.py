"""Means of token values with their standard errors."""

from __future__ import annotations

import math

import numpy as np

from cushion_deploy.core.dtypes import FloatArray


def mean(values: FloatArray) -> float:
    """Return the mean, accumulated in float64; NaN of no value."""
    return float(values.mean(dtype=np.float64)) if values.size else math.nan


def standard_error(values: FloatArray) -> float:
    """Return the standard error of the mean, with Bessel's correction; NaN for a single or a non-finite value.

    The values are treated as independent.
    """
    if values.size < 2 or not np.isfinite(values).all():
        return math.nan
    return float(values.std(dtype=np.float64, ddof=1)) / math.sqrt(values.size)
