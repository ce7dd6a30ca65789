"""How texts are cut for scoring: what the recipe says, then what published results do, then what the model allows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cushion_deploy.calib.corpora import Corpus
from cushion_deploy.errors import UsageError
from cushion_deploy.modeling.runner import TorchRunner
from cushion_deploy.recipe import Recipe
from cushion_deploy.stages.windows import Cut, evaluation_windows

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
    assert cut(None, 4) == dataclasses.replace(cut("c4", 4))
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
