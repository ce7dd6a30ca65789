"""Perplexity over non-overlapping windows; tokens of a prefix are not scored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.progress import Progress, silent
from cushion_deploy.core.statistics import mean, standard_error
from cushion_deploy.errors import UsageError

BLOCK = 16
"""Positions whose probabilities are computed at once."""
TokenNll = Callable[[IntArray], FloatArray]
"""Maps token ids int64 ``[1, n]`` to the negative log likelihoods (nats) of tokens 1..n-1, ``[1, n-1]``."""


@dataclass(frozen=True)
class TextScore:
    """The loss of every scored token of a text.

    Attributes:
        losses: negative log likelihoods in nats, float32 ``[windows, window - 1]``.
    """

    losses: FloatArray

    @property
    def window(self) -> int:
        """Tokens per window; the first of each is only context."""
        return int(self.losses.shape[1]) + 1

    @property
    def tokens(self) -> int:
        """Number of scored tokens."""
        return int(self.losses.size)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss; infinity if that overflows or the mean is NaN."""
        found = mean(self.losses)
        return math.exp(found) if found < 700 else math.inf

    @property
    def stderr(self) -> float:
        """Standard error of perplexity (delta method, treating tokens as independent); NaN for a single token."""
        return self.perplexity * standard_error(self.losses)


@dataclass(frozen=True)
class TextWindows:
    """Windows from the start of a text.

    Attributes:
        ids: int64 ``[count, window]``.
        text_tokens: number of tokens of the whole text.
    """

    ids: IntArray
    text_tokens: int


def cut_windows(ids: IntArray, window: int, max_tokens: int | None, name: str) -> TextWindows:
    """Return non-overlapping windows from the start of a text; a remainder shorter than a window is left out.

    Args:
        ids: the text, int64 ``[n]``.
        window: tokens per window.
        max_tokens: maximum number of tokens to read; None for all.
        name: name of the text, for the error.

    Raises:
        UsageError: the text is shorter than one window.
    """
    if max_tokens and max_tokens < window <= len(ids):
        raise UsageError(
            f"{name} holds {len(ids)} tokens, of which {max_tokens} may be used, fewer than one window of {window}",
            hint="use a smaller window (--window of eval and study, evaluation.window of a recipe), or more tokens "
            "(--max-tokens, evaluation.max_tokens)",
        )
    require_tokens(len(ids), window, name)
    count = min(len(ids), max_tokens or len(ids)) // window
    return TextWindows(ids[: count * window].reshape(count, window), len(ids))


def require_tokens(tokens: int, window: int, name: str) -> None:
    """Check that a text of some tokens has one window; raises UsageError with its name."""
    if tokens < window:
        raise UsageError(
            f"{name} holds {tokens} tokens, fewer than one window of {window}",
            hint="use more text or a smaller window (--window of eval and study, evaluation.window of a recipe)",
        )


def score_text(nll: TokenNll, windows: IntArray, progress: Progress = silent, task: str = "perplexity") -> TextScore:
    """Return the losses of all windows ``[count, window]``; the first token of each window is only context."""
    rows = []
    for done, window in enumerate(windows, 1):
        rows.append(nll(window[None]).astype(np.float32, copy=False))
        progress(task, done, len(windows))
    return TextScore(np.concatenate(rows))


def nll_of_logits(logits: FloatArray, ids: IntArray) -> FloatArray:
    """Return the token losses ``[batch, n-1]`` from logits ``[batch, n, vocab]`` and ids ``[batch, n]``."""
    targets = ids[:, 1:]
    count = int(targets.shape[-1])
    found = np.empty(targets.shape, dtype=np.float32)
    # In blocks, because in float64 all logits of a large vocabulary take gigabytes.
    for start in range(0, count, BLOCK):
        part = slice(start, min(start + BLOCK, count))
        scores = logits[:, part].astype(np.float64)
        top = scores.max(axis=-1, keepdims=True)
        normalizer = np.log(np.exp(scores - top).sum(axis=-1)) + top[..., 0]
        chosen = np.take_along_axis(scores, targets[:, part, None], axis=-1)[..., 0]
        found[:, part] = normalizer - chosen
    return found
