"""How texts are cut: what the recipe says, then what published results do, then what the model allows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.windows import Cut, calibrated_rows, calibration_windows, default_window, evaluation_windows

PLENTY = 100_000


def cut(data: str | None, prefix: int | None = None, **settings: int) -> Cut:
    return Cut.of(Recipe().merged({f"evaluation.{name}": value for name, value in settings.items()}), data, prefix)


@pytest.mark.parametrize(
    ("data", "settings", "window", "most"),
    [
        (None, {}, 512, 4096),
        ("c4", {}, 512, 4096),
        ("text.txt", {}, 512, 4096),
        ("wikitext", {}, 2048, None),
        ("wikitext", {"window": 512}, 512, None),
        ("wikitext", {"max_tokens": 8192}, 2048, 8192),
        ("wikitext", {"max_tokens": 1000}, 1000, 1000),
        ("wikitext", {"window": 4096, "max_tokens": 8192}, 4096, 8192),
        (None, {"window": 64}, 64, 4096),
        (None, {"window": 8192}, 8192, 8192),
        (None, {"max_tokens": 100}, 100, 100),
        (None, {"window": 64, "max_tokens": 128}, 64, 128),
    ],
)
def test_the_recipe_decides_before_the_text(
    data: str | None, settings: dict[str, int], window: int, most: int | None
) -> None:
    found = cut(data, **settings)
    assert (found.window_in(PLENTY), found.max_tokens) == (window, most)


def test_only_a_window_that_nobody_chose_is_shortened() -> None:
    # The recipe's prefix takes up to 4 positions.
    assert cut("wikitext").window_in(2048) == 2044
    assert cut("wikitext").window_in(2052) == 2048
    assert cut("wikitext", 0).window_in(2048) == 2048
    assert cut(None).window_in(256) == 252
    assert cut("wikitext", window=2048).window_in(2048) == 2048


def test_equal_cuts_are_equal_settings_however_they_were_given() -> None:
    assert cut(None, 4) == replace(cut("c4", 4))
    assert cut("wikitext", window=64, max_tokens=128) == cut(None, window=64, max_tokens=128)


def test_an_estimate_counts_all_of_a_benchmark() -> None:
    assert cut(None).tokens == 4096
    assert 250_000 < cut("wikitext").tokens < 400_000


def test_a_text_is_cut_to_what_the_model_has_room_for(tiny_model: TorchRunner) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    ids = tiny_model.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tiny_model.spec.max_positions == 256
    found = evaluation_windows(tiny_model, Corpus("a", (text,)), cut("wikitext"), prefix=4)
    count = len(ids) // 252
    assert found.text_tokens == len(ids)
    assert found.ids.tolist() == np.reshape(ids[: count * 252], (count, 252)).tolist()
    with pytest.raises(UsageError, match=r"evaluation\.window is 256, but a prefix of up to 4 leaves 252"):
        evaluation_windows(tiny_model, Corpus("a", (text,)), cut("wikitext", window=256), prefix=4)


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


def test_a_default_window_reaches_beyond_sliding_windows_and_settings_count() -> None:
    assert cut(None).window_in(PLENTY, 4096) == 4608
    assert cut(None).window_in(4096, 4096) == 4092
    assert cut(None).window_in(PLENTY, 512) == 1024
    assert cut("wikitext").window_in(PLENTY, 512) == 2048
    assert cut(None, max_tokens=300).window_in(PLENTY, 4096) == 300
    assert cut(None, max_tokens=1000).window_in(PLENTY, 4096) == 1000
    assert cut(None, window=100).window_in(PLENTY, 4096) == 100


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
    text, wide = corpus(6000), model_with(with_windows(spec, 500))
    assert evaluation_windows(wide, text, cut(None)).ids.shape == (4, 1012)
    assert evaluation_windows(model_with(spec), text, cut(None)).ids.shape == (8, 512)
    assert evaluation_windows(wide, text, cut(None, window=100, max_tokens=1000)).ids.shape == (10, 100)
    # One window at least.
    assert evaluation_windows(model_with(with_windows(spec, 4096)), text, cut(None)).ids.shape == (1, 4608)


def test_a_pass_of_the_calibration_is_bounded() -> None:
    assert [calibrated_rows(window) for window in (48, 512, 1024, 4608)] == [4, 4, 2, 1]
