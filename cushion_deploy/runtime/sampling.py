"""Choose the next token from logits, in numpy: greedy, temperature, top-k, top-p, min-p, repetition penalty."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import CheckFailed, UsageError

Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters; the defaults are greedy.

    The steps apply in the order that transformers uses: repetition penalty, temperature, top-k, top-p, min-p.

    Attributes:
        temperature: divides the logits; 0 takes the most probable token and ignores the filters.
        top_k: keep the k most probable tokens and any that tie with the last of them; 0 keeps all.
        top_p: keep the fewest most probable tokens whose probabilities sum to at least this.
        min_p: keep tokens at least this many times as probable as the most probable one.
        repetition_penalty: divides the positive logits of tokens in the history, multiplies the negative ones.
        seed: seed of PCG64; None for one from the operating system.

    Raises:
        UsageError: a value outside its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        _require("temperature", self.temperature, 0 <= self.temperature < math.inf, "a finite number, 0 or more")
        _require("top_k", self.top_k, _is_int(self.top_k) and self.top_k >= 0, "a whole number, 0 for no limit")
        _require("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _require("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1")
        penalty = self.repetition_penalty
        _require("repetition_penalty", penalty, 0 < penalty < math.inf, "a finite number above 0, 1 for none")
        valid_seed = self.seed is None or (_is_int(self.seed) and self.seed >= 0)
        _require("seed", self.seed, valid_seed, "a whole number, 0 or more")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(name: str, value: object, valid: bool, expected: str) -> None:
    if not valid:
        raise UsageError(f"{name} is {value}", hint=f"{name} must be {expected}")


def distribution(logits: FloatArray, params: SamplingParams, history: Iterable[int] = ()) -> Probabilities:
    """Return the probability of each token being chosen, float64 ``[vocab]``.

    Args:
        logits: float ``[vocab]``; minus infinity forbids a token.
        params: sampling parameters; temperature 0 gives probability 1 to the most probable token, the first of ties.
        history: token ids that the repetition penalty applies to, usually those of the prompt included.

    Raises:
        CheckFailed: a logit is NaN or plus infinity, or none is finite.
    """
    scores = np.asarray(logits, dtype=np.float64)
    if np.isnan(scores).any() or (top := scores.max()) == np.inf:
        bad = int(np.isnan(scores).sum() + (scores == np.inf).sum())
        raise CheckFailed(
            f"{bad} of {scores.size} logits are NaN or infinite, so no token can be chosen",
            hint="run `cushion-deploy parity` on the bundle to find the first layer where this happens",
        )
    if top == -np.inf:
        raise CheckFailed("every token is forbidden: all logits are minus infinity", hint="allow at least one token")
    scores = _penalized(scores, params.repetition_penalty, history)
    if params.temperature == 0:
        chosen = np.zeros(scores.size)
        chosen[int(scores.argmax())] = 1.0
        return chosen
    # The maximum is subtracted before the division: it stays zero at any temperature, and the others may become -inf.
    with np.errstate(over="ignore"):
        scores = (scores - scores.max()) / params.temperature
    if 0 < params.top_k < scores.size:
        limit = np.partition(scores, -params.top_k)[-params.top_k]
        scores = np.where(scores < limit, -np.inf, scores)
    probabilities = _softmax(scores)
    if params.top_p < 1:
        probabilities = _nucleus(probabilities, params.top_p)
    if params.min_p > 0:
        probabilities = np.where(probabilities < params.min_p * probabilities.max(), 0.0, probabilities)
    normalized: Probabilities = probabilities / probabilities.sum()
    return normalized


def _penalized(scores: Probabilities, penalty: float, history: Iterable[int]) -> Probabilities:
    if penalty == 1:
        return scores
    seen = np.unique(np.fromiter(history, dtype=np.int64))
    scores = scores.copy()
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    return scores


def _softmax(scores: Probabilities) -> Probabilities:
    weights: Probabilities = np.exp(scores - scores.max())
    total: Probabilities = weights / weights.sum()
    return total


def _nucleus(probabilities: Probabilities, top_p: float) -> Probabilities:
    # Tokens below (1 - p) / V sum to less than 1 - p, so the nucleus is within the others and only those are sorted.
    candidates = np.flatnonzero(probabilities >= (1 - top_p) / probabilities.size)
    order = candidates[np.argsort(-probabilities[candidates], kind="stable")]
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    kept = np.zeros_like(probabilities)
    kept[order[:count]] = probabilities[order[:count]]
    return kept


class Sampler:
    """Draws tokens in sequence; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams) -> None:
        """Seed the random generator with ``params.seed``."""
        self.params = params
        self._random = np.random.Generator(np.random.PCG64(params.seed))

    def next(self, logits: FloatArray, history: Iterable[int] = ()) -> int:
        """Return a token id drawn from :func:`distribution`.

        Args:
            logits: float ``[vocab]``.
            history: token ids that the repetition penalty applies to.

        Raises:
            CheckFailed: a logit is NaN or infinite.
        """
        probabilities: Any = distribution(logits, self.params, history)
        if self.params.temperature == 0:
            return int(probabilities.argmax())
        cumulative = np.cumsum(probabilities)
        # Scaled by the last sum, which is not exactly 1 after rounding; `right` never selects a probability of 0.
        return int(np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right"))
