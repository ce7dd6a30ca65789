"""Texts reach beyond the sliding windows of a model unless a recipe says otherwise; what a recipe says counts."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.stages.windows import (
    calibrated_rows,
    calibration_windows,
    default_window,
    evaluation_windows,
    scored_tokens,
)


@pytest.fixture
def spec(tiny_model: TorchRunner) -> ModelSpec:
    """Return a spec without windows, with room for any text."""
    return replace(tiny_model.spec, max_positions=32768)


def with_windows(spec: ModelSpec, *windows: int, positions: int = 32768) -> ModelSpec:
    return replace(spec, windows=windows, max_positions=positions)


@pytest.mark.parametrize(
    ("windows", "positions", "tokens"),
    [
        ((), 2048, 512),
        ((), 512, 448),
        ((64, 64), 8192, 576),
        ((512, 0, 512), 32768, 1024),
        ((0, 4096), 8192, 4608),
        ((4096,), 4096, 3584),
    ],
)
def test_a_window_has_512_tokens_beyond_the_sliding_ones_where_the_positions_allow_it(
    spec: ModelSpec, windows: tuple[int, ...], positions: int, tokens: int
) -> None:
    assert default_window(with_windows(spec, *windows, positions=positions)) == tokens


def test_one_window_at_least_is_scored_and_settings_count(spec: ModelSpec) -> None:
    wide = with_windows(spec, 4096)
    assert scored_tokens(None, None, spec) == (512, 4096)
    assert scored_tokens(None, None, wide) == (4608, 4608)
    assert scored_tokens(None, 300, wide) == (300, 300)
    assert scored_tokens(100, None, wide) == (100, 4096)
    assert scored_tokens(5000, None, spec) == (5000, 5000)
    assert scored_tokens(None, None) == (512, 4096)


def model_with(spec: ModelSpec) -> Any:
    """Return a model whose tokens are the numbers in a text."""
    return SimpleNamespace(spec=spec, encode=lambda text: np.array(text.split(), dtype=np.int64))


def corpus(*lengths: int) -> Corpus:
    """Return documents of consecutive numbers from 1 on."""
    ends = np.cumsum(lengths)
    documents = [" ".join(map(str, range(end - n + 1, end + 1))) for n, end in zip(lengths, ends, strict=True)]
    return Corpus("numbers", tuple(documents))


def test_calibration_beyond_sliding_windows_takes_as_many_tokens_of_joined_documents(spec: ModelSpec) -> None:
    text = corpus(*[276] * 44)
    ids, mask = calibration_windows(model_with(with_windows(spec, 500)), text, 10, None)
    # 10 windows of 512 are 5,120 tokens, which is 5 windows of 1,012.
    assert ids.shape == (5, 1012)
    assert mask.all()
    assert (np.diff(ids, axis=1) == 1).all()


def test_calibration_without_sliding_windows_or_with_a_set_window_joins_no_documents(spec: ModelSpec) -> None:
    text = corpus(*[300] * 40)
    ids, mask = calibration_windows(model_with(spec), text, 10, None)
    assert (ids.shape, mask.sum(axis=1).tolist()) == ((10, 512), [300] * 10)
    ids, mask = calibration_windows(model_with(with_windows(spec, 500)), text, 10, 600)
    assert (ids.shape, mask.sum(axis=1).tolist()) == ((10, 600), [300] * 10)


def test_evaluation_reaches_beyond_sliding_windows(spec: ModelSpec) -> None:
    text = corpus(6000)
    assert evaluation_windows(model_with(with_windows(spec, 500)), text, None, None).shape == (4, 1012)
    assert evaluation_windows(model_with(spec), text, None, None).shape == (8, 512)
    assert evaluation_windows(model_with(with_windows(spec, 500)), text, 100, 1000).shape == (10, 100)


def test_a_pass_of_the_calibration_is_bounded() -> None:
    assert [calibrated_rows(window) for window in (48, 512, 1024, 4608)] == [4, 4, 2, 1]
