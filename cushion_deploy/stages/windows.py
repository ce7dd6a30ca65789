"""Cut texts into windows that the model runs on, and check that these fit the model's positions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cushion_deploy.calib.corpora import Corpus, pack_windows
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import cut_windows
from cushion_deploy.recipe import Recipe

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner


def calibration_windows(model: TorchRunner, text: Corpus, count: int, window: int) -> tuple[IntArray, IntArray]:
    """Return the ids and mask of up to ``count`` windows, int64 ``[windows, window]``; documents are not joined."""
    documents = [model.encode(document) for document in text.documents]
    return pack_windows(documents, window, count, text.name)


def evaluation_windows(model: TorchRunner, text: Corpus, window: int, max_tokens: int) -> IntArray:
    """Return the windows for measuring perplexity, int64 ``[count, window]``, from the start of a text."""
    return cut_windows(model.encode(text.text), window, max_tokens, text.name)


def spread_windows(model: TorchRunner, text: Corpus, count: int, window: int) -> IntArray:
    """Return up to ``count`` full windows, int64 ``[count, window]``, spread evenly over a text."""
    ids = model.encode(text.text)
    windows = cut_windows(ids, window, len(ids), text.name)
    chosen: IntArray = windows[np.unique(np.linspace(0, len(windows) - 1, min(count, len(windows))).astype(int))]
    return chosen


def longest_prefix(recipe: Recipe) -> int:
    """Return the maximum number of positions that the prefix of a build may occupy."""
    return recipe.search.max_length if recipe.search.enabled and recipe.export.prefix != "none" else 0


def require_positions(setting: str, tokens: int, prefix: int, spec: ModelSpec) -> None:
    """Check that a text of ``tokens`` fits behind a prefix of ``prefix`` positions.

    Raises:
        UsageError: the text does not fit; the message names the setting.
    """
    room = spec.max_positions - prefix
    if tokens > room:
        raise UsageError(
            f"{setting} is {tokens}, but a prefix of up to {prefix} leaves {room} of the model's "
            f"{spec.max_positions} positions",
            hint=f"set {setting} to at most {room}" + (", or search.max_length lower" if prefix else ""),
        )


def require_recipe_fits(recipe: Recipe, spec: ModelSpec) -> None:
    """Check that every text of a build fits the model's positions, before any expensive work.

    Raises:
        UsageError: a text does not fit; the message names the setting.
    """
    prefix = longest_prefix(recipe)
    needed = {
        "search.text_tokens": recipe.search.text_tokens if prefix else 0,
        "tuning.window": recipe.tuning.window if recipe.tuning.enabled else 0,
        "calibration.window": recipe.calibration.window,
        "evaluation.window": recipe.evaluation.window,
        "parity.tokens + parity.decode_tokens": recipe.parity.tokens + recipe.parity.decode_tokens,
    }
    for setting, tokens in needed.items():
        require_positions(setting, tokens, prefix, spec)
