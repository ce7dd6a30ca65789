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


TOKENS = 512
"""Tokens in a window of text, and beyond the sliding window of a model, unless a recipe says otherwise."""
SCORED = 4096
"""Tokens to score unless a recipe says otherwise."""
ROWS, POSITIONS = 4, 2048
"""Windows, and token positions, in a pass of the calibration: one window if that is longer."""


def default_window(spec: ModelSpec) -> int:
    """Return the tokens in a window of text for a recipe that does not say.

    Text must reach beyond the sliding windows of a model to show what happens there. An eighth of the positions is left
    to the prefix.
    """
    return min(spec.smallest_window + TOKENS, spec.max_positions - spec.max_positions // 8)


def calibration_windows(model: TorchRunner, text: Corpus, count: int, window: int | None) -> tuple[IntArray, IntArray]:
    """Return the ids and mask of up to ``count`` windows, int64 ``[windows, window]``; documents are not joined.

    With ``window`` None, the windows of a model with sliding windows are longer, and fewer, so that calibration takes
    as many tokens. Then documents are joined, because few are as long.
    """
    documents = [model.encode(document) for document in text.documents]
    if window is None:
        window = default_window(model.spec)
        if window > TOKENS:
            documents, count = [np.concatenate(documents)], max(1, count * TOKENS // window)
    return pack_windows(documents, window, count, text.name)


def calibrated_rows(window: int) -> int:
    """Return the windows of ``window`` tokens in a pass of the calibration, which bounds memory."""
    return min(ROWS, max(1, POSITIONS // window))


def scored_tokens(window: int | None, max_tokens: int | None, spec: ModelSpec | None = None) -> tuple[int, int]:
    """Return the tokens in a window, and the maximum number of tokens, that perplexity is measured on.

    Args:
        window, max_tokens: as in a recipe.
        spec: the model; None for one whose sliding windows are not known.
    """
    if window is None:
        window = default_window(spec) if spec else TOKENS
        window = min(window, max_tokens or window)
    return window, max_tokens or max(SCORED, window)


def evaluation_windows(model: TorchRunner, text: Corpus, window: int | None, max_tokens: int | None) -> IntArray:
    """Return the windows for measuring perplexity, int64 ``[count, window]``, from the start of a text."""
    return cut_windows(model.encode(text.text), *scored_tokens(window, max_tokens, model.spec), text.name)


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
        "calibration.window": recipe.calibration.window or 0,
        "evaluation.window": recipe.evaluation.window or 0,
        "parity.tokens + parity.decode_tokens": recipe.parity.tokens + recipe.parity.decode_tokens,
    }
    for setting, tokens in needed.items():
        require_positions(setting, tokens, prefix, spec)
