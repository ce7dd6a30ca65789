"""Cut the documents of a corpus into windows of tokens, some for calibration and others for judging its result."""

from __future__ import annotations

import numpy as np

from cushion_deploy.core.dtypes import IntArray
from cushion_deploy.errors import UsageError


def pack_windows(documents: list[IntArray], window: int, count: int, name: str) -> tuple[IntArray, IntArray]:
    """Cut documents into windows and select up to ``count`` of them, spread evenly over the corpus.

    Args:
        documents: token ids int64 ``[n]`` of each document.
        window: tokens per window; the last window of a document is padded on the right.
        count: largest number of windows.
        name: name of the corpus, for the error.

    Returns:
        ids and mask, int64 ``[windows, window]``; the mask is 0 on padding.

    Raises:
        UsageError: the corpus is shorter than one window.
    """
    require_window(sum(len(d) for d in documents), window, name)
    pieces = _pieces(documents, window)
    chosen = [pieces[i] for i in _spread(len(pieces), count)]
    ids = np.zeros((len(chosen), window), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, piece in enumerate(chosen):
        ids[row, : len(piece)], mask[row, : len(piece)] = piece, 1
    return ids, mask


def require_window(tokens: int, window: int, name: str) -> None:
    """Check that a corpus of some tokens has one window; raises UsageError with its name."""
    if tokens < window:
        raise UsageError(
            f"{name} holds {tokens} tokens, fewer than one window of {window}",
            hint="give more text, or a smaller window (calibration.window)",
        )


def other_pieces(documents: list[IntArray], window: int, count: int, most: int) -> list[IntArray]:
    """Return up to ``most`` pieces, int64 ``[n]`` each, that :func:`pack_windows` does not select, spread evenly.

    If it selects all, they are some of those.
    """
    pieces = _pieces(documents, window)
    selected = set(_spread(len(pieces), count))
    others = [i for i in range(len(pieces)) if i not in selected] or sorted(selected)
    return [pieces[others[i]] for i in _spread(len(others), most)]


def _pieces(documents: list[IntArray], window: int) -> list[IntArray]:
    """Return the windows of all documents, the last one of each shorter; very short ones are dropped."""
    pieces = [d[i : i + window] for d in documents for i in range(0, len(d), window)]
    return [p for p in pieces if len(p) >= min(window, 32)] or pieces


def _spread(length: int, count: int) -> list[int]:
    """Return up to ``count`` indices of a sequence, spread evenly."""
    return [int(i) for i in np.unique(np.linspace(0, length - 1, min(count, length)).astype(int))]
