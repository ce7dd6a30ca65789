"""Log likelihoods of token ids on any decoder session with a cache: torch, fake-quant, or an engine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray, IntArray
from cushion_deploy.core.session import DecoderSession, context_limit
from cushion_deploy.errors import CheckFailed, UsageError

ENGINE_WASTE, TORCH_WASTE = 1.2, 2.0
"""Measured with SmolLM2 on a CPU: a token costs ONNX Runtime about 15 % less in a batch of 8, torch about half."""
BoolArray = npt.NDArray[np.bool_]
Scored = tuple[float, bool]
"""The log probability (nats) of a continuation, and whether greedy decoding would produce it."""


def token_losses(logits: FloatArray, targets: IntArray) -> tuple[FloatArray, BoolArray]:
    """Return the loss of each target, and whether greedy decoding would choose it.

    Args:
        logits: float32 ``[n, vocab]``.
        targets: int64 ``[n]``, the token that follows each row.

    Returns:
        Negative log likelihoods (nats) float32 ``[n]``, and whether the target has the highest logit, bool ``[n]``.
    """
    scores = logits.astype(np.float32, copy=False)
    top = scores.max(axis=-1, keepdims=True)
    # Exponentials in float32 take a third of the time of float64; the sum has many terms, so it is in float64.
    total = np.exp(scores - top).sum(axis=-1, dtype=np.float64)
    chosen = np.take_along_axis(scores, targets[:, None], axis=-1)
    losses = np.log(total) + (top - chosen)[:, 0].astype(np.float64)
    return losses.astype(np.float32), scores.argmax(axis=-1) == targets


class Scorer:
    """Scores one sequence at a time; tokens shared with the start of the previous one are reused from the cache.

    Args:
        session: a decoder; used by nothing else until :meth:`reset`.
        piece: number of tokens whose logits are in memory at once.
        waste: tokens that a batch of several contexts may run, relative to one request at a time: how much less a token
            costs in a batch.
    """

    def __init__(self, session: DecoderSession, piece: int = 128, waste: float = ENGINE_WASTE) -> None:
        """Start with an empty cache."""
        self.session, self.waste = session, waste
        self.piece = piece
        self.reset()

    @property
    def limit(self) -> int:
        """Number of tokens that fit into the context, not counting the prefix."""
        return context_limit(self.session.contract)

    def reset(self) -> None:
        """Empty the cache; required after anything else has used the session."""
        self._held: list[int] = []
        self.session.reset()

    def nll(self, ids: IntArray) -> FloatArray:
        """Return the negative log likelihoods (nats) float32 ``[1, n-1]`` of tokens 1.. of ids int64 ``[1, n]``.

        Raises:
            UsageError: more tokens than the context holds.
        """
        self.reset()
        losses, _ = self._score(ids[0].tolist(), 0)
        return losses[None]

    def loglikelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Scored:
        """Return the log probability (nats) of a continuation, and whether greedy decoding would produce it.

        A context that is too long is truncated at its beginning, as in lm-eval.

        Args:
            context: token ids, at least one.
            continuation: token ids, at least one.

        Raises:
            UsageError: an empty context or continuation, or a continuation that does not fit into the model.
            CheckFailed: the model returned NaN.
        """
        tokens = self.fit(context, continuation)
        return self.score(tokens, len(tokens) - len(continuation))

    def fit(self, context: Sequence[int], continuation: Sequence[int]) -> list[int]:
        """Return context and continuation, without the beginning that does not fit; see :meth:`loglikelihood`."""
        if not context or not continuation:
            raise UsageError(
                f"{len(context)} tokens of context and {len(continuation)} of continuation cannot be scored",
                hint="pass at least one of each; the beginning-of-sequence token may be the context",
            )
        if len(continuation) > self.limit:
            raise UsageError(
                f"a continuation of {len(continuation)} tokens does not fit into the model's {self.limit} positions",
                hint="score a shorter text, or use loglikelihood_rolling, which splits it",
            )
        return [*context, *continuation][-(self.limit + 1) :]

    def score(self, tokens: list[int], context: int) -> Scored:
        """Return the score of the tokens behind a context of ``context`` tokens; all of them fit into the model."""
        return self.total(*self._score(tokens, context - 1))

    def total(self, losses: FloatArray, greedy: BoolArray) -> Scored:
        """Return the log probability of a continuation from the losses and greedy flags of its tokens."""
        total = float(losses.sum(dtype=np.float64))
        if np.isnan(total):
            self.reset()
            raise CheckFailed(
                "the model returned NaN", hint="run `cushion-deploy parity` to find where NaN first occurs"
            )
        return -total, bool(greedy.all())

    def _score(self, tokens: list[int], first: int) -> tuple[FloatArray, BoolArray]:
        """Feed all tokens but the last; return losses and greedy flags of those after position ``first``."""
        fed = tokens[:-1]
        shared = common(self._held, fed, first)
        self.session.truncate(shared)
        ids = np.asarray(tokens, dtype=np.int64)
        losses, greedy = [np.zeros(0, np.float32)], [np.zeros(0, np.bool_)]
        try:
            if shared < first:
                self.session.run(ids[None, shared:first], need_logits="none")
            for begin in range(first, len(fed), self.piece):
                end = min(begin + self.piece, len(fed))
                logits = self.session.run(ids[None, begin:end], need_logits="all")
                if logits is None:
                    raise TypeError("the session returned no logits although they were requested")
                found = token_losses(logits[0], ids[begin + 1 : end + 1])
                losses.append(found[0])
                greedy.append(found[1])
        finally:
            # Also after an error: the cache contains whatever was fed until then.
            self._held = fed[: self.session.length]
        return np.concatenate(losses), np.concatenate(greedy)


def common(held: Sequence[int], wanted: Sequence[int], most: int) -> int:
    """Return the length of the common beginning of two sequences, at most ``most``."""
    count = 0
    for a, b in zip(held[:most], wanted[:most], strict=False):
        if a != b:
            break
        count += 1
    return count
