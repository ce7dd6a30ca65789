"""Cut texts into windows that the model runs on, and check that these fit the model's positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cushion_deploy.calib.corpora import BENCHMARKS, Corpus
from cushion_deploy.calib.packing import other_pieces, pack_windows
from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.core.model_spec import ModelSpec
from cushion_deploy.errors import UsageError
from cushion_deploy.evaluate.perplexity import TextWindows, cut_windows
from cushion_deploy.recipe import Recipe

if TYPE_CHECKING:
    from cushion_deploy.modeling.runner import TorchRunner

WINDOW, MAX_TOKENS = 512, 4096
"""Tokens per window, beyond the sliding windows of a model, and of the whole excerpt, where neither the recipe nor the
text says otherwise."""
ROWS, POSITIONS = 4, 2048
"""Windows, and token positions, in a pass of the calibration: one window if that is longer."""
BENCHMARK_WINDOW = 2048
"""Tokens per window of published perplexities on WikiText-2."""


@dataclass(frozen=True)
class Cut:
    """How a text is cut into windows that are scored.

    Attributes:
        window: tokens per window.
        max_tokens: number of tokens to read from the start of the text; None for all.
        reserved: positions that the window leaves free for a prefix if the model has too few for both; None if the
            window is fixed. One that is not fixed reaches beyond the sliding windows of a model.
        bounded: whether the recipe sets ``max_tokens``, which no window exceeds then.
    """

    window: int
    max_tokens: int | None
    reserved: int | None = None
    bounded: bool = False

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
        if most is not None:
            return cls(window, most, reserved, bounded=reserved is not None)
        return cls(window, None if benchmark else max(MAX_TOKENS, window), reserved)

    @property
    def tokens(self) -> int:
        """The approximate number of tokens to read, for estimates; all of a text are those of a benchmark."""
        return self.max_tokens or max(BENCHMARKS.values())

    def window_in(self, positions: int, sliding: int = 0) -> int:
        """Return the tokens per window for a model.

        Args:
            positions: the model's.
            sliding: its smallest sliding window; 0 for none, or if it is not known.
        """
        if self.reserved is None:
            return self.window
        wanted = max(self.window, sliding + WINDOW) if sliding else self.window
        if self.bounded and self.max_tokens is not None:
            wanted = min(wanted, self.max_tokens)
        return min(wanted, positions - self.reserved)

    def windows(self, ids: IntArray, positions: int, name: str, sliding: int = 0) -> TextWindows:
        """Cut token ids int64 ``[n]``; raises UsageError, with the name of the text, if they are too few."""
        window = self.window_in(positions, sliding)
        return cut_windows(ids, window, self.max_tokens and max(self.max_tokens, window), name)


def default_window(spec: ModelSpec) -> int:
    """Return the tokens in a window of text for a recipe that does not say.

    Text must reach beyond the sliding windows of a model to show what happens there. An eighth of the positions is left
    to the prefix.
    """
    return min(spec.smallest_window + WINDOW, spec.max_positions - spec.max_positions // 8)


def calibration_windows(model: TorchRunner, text: Corpus, count: int, window: int | None) -> tuple[IntArray, IntArray]:
    """Return the ids and mask of up to ``count`` windows, int64 ``[windows, window]``; documents are not joined.

    With ``window`` None, the windows of a model with sliding windows are longer, and fewer, so that calibration takes
    as many tokens. Then documents are joined, because few are as long.
    """
    documents, window, count = _calibration_cut(model, text, count, window)
    return pack_windows(documents, window, count, text.name)


def _calibration_cut(
    model: TorchRunner, text: Corpus, count: int, window: int | None
) -> tuple[list[IntArray], int, int]:
    """Return the documents, the tokens in a window and the number of windows of a calibration."""
    documents = [model.encode(document) for document in text.documents]
    if window is None:
        window = default_window(model.spec)
        if window > WINDOW:
            documents, count = [np.concatenate(documents)], max(1, count * WINDOW // window)
    return documents, window, count


def held_out_windows(model: TorchRunner, text: Corpus, count: int, window: int | None, most: int) -> IntArray:
    """Return full windows, int64 ``[windows, length]``, of text that :func:`calibration_windows` does not return.

    If a text is too short for both, they are some of the same text.

    Args:
        model, text, count, window: as for :func:`calibration_windows`.
        most: maximum number of calibration windows to leave out; they are joined, because many are short, and cut to
            windows of at most 512 tokens, as texts are evaluated.
    """
    pieces = other_pieces(*_calibration_cut(model, text, count, window), most)
    ids = np.concatenate(pieces)
    positions = model.spec.max_positions
    count = -(-len(ids) // min(WINDOW, positions - positions // 8))
    length = len(ids) // count
    found: IntArray = ids[: count * length].reshape(count, length)
    return found


def calibrated_rows(window: int) -> int:
    """Return the windows of ``window`` tokens in a pass of the calibration, which bounds memory."""
    return min(ROWS, max(1, POSITIONS // window))


def evaluation_windows(model: TorchRunner, text: Corpus, cut: Cut, prefix: int = 0) -> TextWindows:
    """Return the windows for measuring perplexity, from the start of a text.

    Raises:
        UsageError: the text is too short, or a window does not fit behind a prefix of ``prefix`` positions.
    """
    positions, sliding = model.spec.max_positions, model.spec.smallest_window
    require_positions("evaluation.window", cut.window_in(positions, sliding), prefix, model.spec)
    return cut.windows(model.encode(text.text), positions, text.name, sliding)


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
    if room < 1:
        raise UsageError(
            f"search.max_length is {prefix}, but the model has {spec.max_positions} positions, and text needs some",
            hint="set search.max_length to a few tokens: the default is 4",
        )
    if tokens > room:
        raise UsageError(
            f"{setting} is {tokens}, but a prefix of up to {prefix} leaves {room} of the model's "
            f"{spec.max_positions} positions",
            hint=f"set {setting} to at most {room}" + (", or search.max_length lower" if prefix else ""),
        )
