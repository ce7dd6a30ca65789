"""Cut texts into windows that the model runs on, and check that these fit the model's positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cushion_deploy.calib.corpora import BENCHMARKS, Corpus, pack_windows
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import TextWindows, cut_windows
from cushion_deploy.recipe import Recipe

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

WINDOW, MAX_TOKENS = 512, 4096
"""Tokens per window and of the whole excerpt, where neither the recipe nor the text says otherwise."""
BENCHMARK_WINDOW = 2048
"""Tokens per window of published perplexities on WikiText-2."""


@dataclass(frozen=True)
class Cut:
    """How a text is cut into windows that are scored.

    Attributes:
        window: tokens per window.
        max_tokens: number of tokens to read from the start of the text; None for all.
        reserved: positions that the window leaves free for a prefix if the model has too few for both; None if the
            window is fixed.
    """

    window: int
    max_tokens: int | None
    reserved: int | None = None

    @classmethod
    def of(cls, recipe: Recipe, data: str | None, prefix: int | None = None) -> Cut:
        """Return how a recipe cuts a text; a benchmark is cut as in published results unless the recipe says otherwise.

        Args:
            recipe: its section ``evaluation``.
            data: the text, as in ``evaluation.data``.
            prefix: positions to reserve; None for the longest prefix of the recipe.
        """
        window, most, benchmark = recipe.evaluation.window, recipe.evaluation.max_tokens, data in BENCHMARKS
        reserved = None
        if window is None:
            window, reserved = BENCHMARK_WINDOW if benchmark else WINDOW, longest_prefix(recipe)
            reserved = reserved if prefix is None else prefix
            window = min(window, most or window)
        if most is None and not benchmark:
            most = max(MAX_TOKENS, window)
        return cls(window, most, reserved)

    @property
    def tokens(self) -> int:
        """The approximate number of tokens to read, for estimates; all of a text are those of a benchmark."""
        return self.max_tokens or max(BENCHMARKS.values())

    def window_in(self, positions: int) -> int:
        """Return the tokens per window for a model with a number of positions."""
        return self.window if self.reserved is None else min(self.window, positions - self.reserved)

    def windows(self, ids: IntArray, positions: int, name: str) -> TextWindows:
        """Cut token ids int64 ``[n]``; raises UsageError, with the name of the text, if they are too few."""
        return cut_windows(ids, self.window_in(positions), self.max_tokens, name)


def calibration_windows(model: TorchRunner, text: Corpus, count: int, window: int) -> tuple[IntArray, IntArray]:
    """Return the ids and mask of up to ``count`` windows, int64 ``[windows, window]``; documents are not joined."""
    documents = [model.encode(document) for document in text.documents]
    return pack_windows(documents, window, count, text.name)


def evaluation_windows(model: TorchRunner, text: Corpus, cut: Cut, prefix: int = 0) -> TextWindows:
    """Return the windows for measuring perplexity, from the start of a text.

    Raises:
        UsageError: the text is too short, or a window does not fit behind a prefix of ``prefix`` positions.
    """
    require_positions("evaluation.window", cut.window_in(model.spec.max_positions), prefix, model.spec)
    return cut.windows(model.encode(text.text), model.spec.max_positions, text.name)


def spread_windows(model: TorchRunner, text: Corpus, count: int, window: int) -> IntArray:
    """Return up to ``count`` full windows, int64 ``[count, window]``, spread evenly over a text."""
    ids = model.encode(text.text)
    windows = cut_windows(ids, window, None, text.name).ids
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
        "evaluation.window": Cut.of(recipe, recipe.evaluation.data).window_in(spec.max_positions),
        "parity.tokens + parity.decode_tokens": recipe.parity.tokens + recipe.parity.decode_tokens,
    }
    for setting, tokens in needed.items():
        require_positions(setting, tokens, prefix, spec)
