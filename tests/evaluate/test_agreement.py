"""Agreement: limits follow from the noise, and what is no number never passes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cushion_deploy.evaluate.agreement import tasks_agree, texts_agree
from cushion_deploy.evaluate.perplexity import TextScore
from cushion_deploy.evaluate.zeroshot import Metric, TaskScore, mean_accuracy

LOSSES = np.random.default_rng(0).gamma(2.0, 1.5, (8, 63)).astype(np.float32)


def task(value: float, stderr: float | None) -> TaskScore:
    return TaskScore("piqa", "acc", 20, {"acc": Metric(value, stderr)})


def test_the_standard_error_of_a_perplexity_is_that_of_repeated_draws() -> None:
    rng = np.random.default_rng(1)
    draws = [math.exp(rng.gamma(2.0, 0.5, 2000).mean()) for _ in range(400)]
    score = TextScore(rng.gamma(2.0, 0.5, (20, 100)).astype(np.float32))
    assert score.stderr == pytest.approx(np.std(draws), rel=0.15)


@pytest.mark.parametrize(("shift", "passed"), [(0.0, True), (0.0049, True), (-0.0049, True), (0.0052, False)])
def test_a_constant_difference_has_no_noise_and_half_a_percent_is_allowed(shift: float, passed: bool) -> None:
    found = texts_agree("text", TextScore(LOSSES + np.float32(shift)), TextScore(LOSSES))
    assert found.difference == pytest.approx(abs(math.expm1(shift)), abs=1e-6)
    assert found.limit == pytest.approx(0.005, abs=1e-6)
    assert found.passed is passed


def test_noise_of_the_paired_difference_widens_the_limit() -> None:
    noise = np.random.default_rng(2).normal(0, 0.3, LOSSES.shape).astype(np.float32)
    found = texts_agree("text", TextScore(LOSSES + noise), TextScore(LOSSES))
    assert found.limit == pytest.approx(0.005 + 2 * 0.3 / math.sqrt(LOSSES.size), rel=0.1)


def test_an_infinite_perplexity_agrees_with_nothing() -> None:
    found = texts_agree("text", TextScore(LOSSES), TextScore(np.full_like(LOSSES, np.inf)))
    assert not found.passed
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["difference"] is None


@pytest.mark.parametrize(("value", "passed"), [(0.5, True), (0.6, True), (0.38, False), (0.65, False)])
def test_a_task_may_differ_by_one_standard_error(value: float, passed: bool) -> None:
    assert tasks_agree(task(value, 0.2), task(0.5, 0.11)).passed is passed


def test_a_task_without_noise_has_to_be_equal() -> None:
    assert tasks_agree(task(1.0, 0.0), task(1.0, None)).passed
    assert not tasks_agree(task(0.9, 0.3), task(1.0, None)).passed


def test_the_error_of_a_mean_over_tasks_adds_in_squares() -> None:
    mean = mean_accuracy([task(0.2, 0.03), task(0.6, 0.04)])
    assert (mean.value, mean.stderr) == (pytest.approx(0.4), pytest.approx(0.025))
    assert mean_accuracy([task(0.2, 0.03), task(0.6, None)]).stderr is None
