"""The scores of a text as JSON, against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.modeling.teacher import Fidelity
from cushion_deploy.stages.scores import scores_of


def ramp(columns: int) -> FloatArray:
    return np.linspace(0, 1, 3 * columns, dtype=np.float32).reshape(3, columns)


def test_every_score_has_its_standard_error() -> None:
    losses, divergences = 2 + ramp(20), ramp(20)[::-1]
    found = scores_of(Fidelity(losses, divergences))
    later = divergences[:, 16:]
    expected = {
        "perplexity": math.exp(losses.mean()),
        "stderr": math.exp(losses.mean()) * losses.std(ddof=1) / math.sqrt(60),
        "divergence": divergences.mean(),
        "divergence_stderr": divergences.std(ddof=1) / math.sqrt(60),
        "kl_after_16": later.mean(),
        "kl_after_16_stderr": later.std(ddof=1) / math.sqrt(12),
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_short_windows_have_no_later_divergence() -> None:
    found = scores_of(Fidelity(ramp(16), ramp(16)))
    assert found["divergence"] == pytest.approx(0.5)
    assert (found["kl_after_16"], found["kl_after_16_stderr"]) == (None, None)


def test_what_is_not_finite_is_null_and_a_rounding_error_is_zero() -> None:
    broken = scores_of(Fidelity(np.full((1, 20), np.nan, np.float32), np.full((1, 20), np.inf, np.float32)))
    assert set(broken.values()) == {None}
    assert scores_of(Fidelity(ramp(20), np.full((3, 20), -1e-9, np.float32)))["divergence"] == 0.0
