"""Perplexity as the field quotes it: non-overlapping windows, no stride, no token of a prefix scored."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from cushion_deploy.errors import UsageError
from cushion_deploy.progress import Progress, silent
from cushion_deploy.types import FloatArray, IntArray

TokenNll = Callable[[IntArray], FloatArray]
"""Takes token ids int64 ``[1, n]``, returns the negative log likelihoods (nats) of tokens 1..n-1, ``[1, n-1]``."""


def cut_windows(ids: IntArray, window: int, max_tokens: int, name: str) -> IntArray:
    """Return non-overlapping windows int64 ``[count, window]`` from the start of a text; a rest is left out.

    Raises:
        UsageError: the text is shorter than one window.
    """
    count = min(len(ids), max_tokens) // window
    if count == 0:
        raise UsageError(
            f"{name} holds {len(ids)} tokens, fewer than one window of {window}",
            hint="give more text, or a smaller window (evaluation.window)",
        )
    return ids[: count * window].reshape(count, window)


def perplexity(nll: TokenNll, windows: IntArray, progress: Progress = silent, task: str = "perplexity") -> float:
    """Return exp of the mean negative log likelihood over all windows; the first token of each is context only."""
    total = 0.0
    for done, window in enumerate(windows, 1):
        total += float(nll(window[None]).sum(dtype=np.float64))
        progress(task, done, len(windows))
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf


def nll_of_logits(logits: FloatArray, ids: IntArray) -> FloatArray:
    """Return the token losses ``[batch, n-1]`` of logits ``[batch, n, vocab]`` over ids ``[batch, n]``."""
    scores = logits[:, :-1].astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    normalizer = np.log(np.exp(scores - top).sum(axis=-1)) + top[..., 0]
    chosen = np.take_along_axis(scores, ids[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(normalizer - chosen, dtype=np.float32)
