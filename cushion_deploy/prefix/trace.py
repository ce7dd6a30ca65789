"""Traces of search and tuning: every step with the numbers that it was decided by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ScoredToken:
    """A token with its exact objective and its sources, such as ``self-sink + gradient``."""

    token_id: int
    token: str
    source: str
    objective: float


@dataclass(frozen=True)
class SearchStep:
    """One iteration of Algorithm 1.

    Attributes:
        best: the best token, scored on the whole text.
        before: L_q(text | p).
        accepted: whether best.objective <= tau * before.
        top: candidates scored on the whole text, best first.
        candidates: number of tokens in the first rung, or in the vocabulary for an exhaustive scan.
        exact: number of tokens scored on the whole text.
        screen_layers: layers that the screen ran; 0 for an exhaustive scan.
        audit_rank, audit_size: rank of ``best`` in a new random sample of the vocabulary, and the sample's size; 0 and
            0 if the step was not accepted.
        proposed: number of candidates of each source; a token with several sources counts for each.
        finalists: how many of those were scored on the whole text.
        screened: number of tokens that the self-sink screen ran; 0 for an exhaustive scan, and in traces that did not
            record it.
    """

    best: ScoredToken
    before: float
    accepted: bool
    top: tuple[ScoredToken, ...]
    candidates: int
    exact: int
    screen_layers: int
    audit_rank: int = 0
    audit_size: int = 0
    proposed: dict[str, int] = field(default_factory=dict)
    finalists: dict[str, int] = field(default_factory=dict)
    screened: int = 0

    @property
    def ratio(self) -> float:
        """L_q with ``best`` appended, divided by L_q before."""
        return self.best.objective / self.before if self.before else float("inf")


@dataclass(frozen=True)
class SinkState:
    """What a prefix does to text. A value that is not finite is None.

    Attributes:
        later: mean divergence of the unquantized model behind the prefix from the model without it, in nats per token,
            from position 16 on.
        error: the objective of the search.
    """

    later: float | None
    error: float | None

    @classmethod
    def of(cls, *values: float) -> SinkState:
        """Return the state; a value that is not finite becomes None."""
        return cls(*(value if math.isfinite(value) else None for value in values))


@dataclass(frozen=True)
class Averaging:
    """The comparison of the found token with the mean of many first tokens at the first position of the prefix.

    Attributes:
        tokens: number of tokens in the mean.
        chats: how many of them are the token that every chat begins with.
        found, averaged: both states.
        slack: the largest ``error`` of the averaged prefix, in multiples of that of the token.
    """

    tokens: int
    chats: int
    found: SinkState
    averaged: SinkState
    slack: float

    @property
    def kept(self) -> bool:
        """Whether the prefix has the mean: its error is within the limit, and it changes the model less."""
        if self.averaged.later is None or self.averaged.error is None:
            return False
        if self.found.later is None or self.found.error is None:
            return True
        return self.averaged.error <= self.slack * self.found.error and self.averaged.later < self.found.later


@dataclass
class SearchTrace:
    """The whole search; ``stopped`` is the reason why it ended, ``seconds`` is wall time.

    A step that was skipped, because no token could pay, is not in ``steps``; ``stopped`` then states its numbers.
    ``bits`` are those of the codes that errors were measured for. ``averaging`` is None if the first position was not
    to be averaged.
    """

    mode: str
    objective: str
    seed_tokens: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()
    steps: list[SearchStep] = field(default_factory=list)
    positions_scored: int = 0
    positions_full_scan: int = 0
    stopped: str = ""
    seconds: float = 0.0
    bits: int = 8
    averaging: Averaging | None = None

    @property
    def averaged(self) -> bool:
        """Whether the first position of the prefix is a mean, and not that of its token."""
        return self.averaging is not None and self.averaging.kept

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchTrace:
        """Rebuild from :meth:`to_json`."""
        d = dict(data)
        d["steps"] = [
            SearchStep(**{**s, "best": ScoredToken(**s["best"]), "top": tuple(ScoredToken(**t) for t in s["top"])})
            for s in d["steps"]
        ]
        for name in ("seed_tokens", "token_ids", "tokens"):
            d[name] = tuple(d[name])
        if averaging := d.get("averaging"):
            states = {name: SinkState(**averaging[name]) for name in ("found", "averaged")}
            d["averaging"] = Averaging(**{**averaging, **states})
        return cls(**d)


@dataclass(frozen=True)
class TuningState:
    """The prefix after some steps of tuning. A value that is not finite is None.

    Attributes:
        step: optimizer steps done; 0 is the untuned prefix.
        held_out: what the kept state has least of on held-out text: L_pred (nats per token), for the loss ``invisible``
            plus lambda * L_q.
        prediction, error: L_pred and L_q of that step, L_q divided by its untuned value, window by window; None at
            the start.
        whole, later: mean divergence (cross-entropy for the loss ``ce``) on held-out text in nats per token: all
            positions, and from position 16 on. None in traces that did not record it.
        held_out_error: L_q on held-out text, divided by its untuned value. None in traces that did not record it.
    """

    step: int
    held_out: float | None
    prediction: float | None
    error: float | None
    whole: float | None = None
    later: float | None = None
    held_out_error: float | None = None

    @classmethod
    def after(cls, step: int, *values: float) -> TuningState:
        """Return the state after ``step`` steps, given the other fields; a value that is not finite becomes None."""
        return cls(step, *(value if math.isfinite(value) else None for value in values))

    @property
    def words(self) -> str:
        """The held-out loss as text."""
        return "not finite" if self.held_out is None else f"{self.held_out:.4f}"


@dataclass
class TuningTrace:
    """The whole tuning.

    Attributes:
        loss: ``invisible``, ``distill`` or ``ce``.
        scales_tuned: whether the scales were trained too.
        steps: optimizer steps.
        states: the evaluated states, in order.
        seconds: wall time.
        skipped: steps without an update, because a gradient was not finite.
    """

    loss: str
    scales_tuned: bool
    steps: int
    states: list[TuningState] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0

    @property
    def best(self) -> TuningState:
        """The first state with the lowest held-out loss, which is the one that is kept."""
        return min(self.states, key=lambda s: math.inf if s.held_out is None else s.held_out)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TuningTrace:
        """Rebuild from :meth:`to_json`."""
        return cls(**{**data, "states": [TuningState(**state) for state in data["states"]]})
