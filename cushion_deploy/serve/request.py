"""What the scheduler is asked for, and what it delivers: one sequence of tokens for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cushion_deploy.core.dtypes import FloatArray
from cushion_deploy.errors import CushionError
from cushion_deploy.runtime.sampling import SamplingParams

EndReason = Literal["eos", "stop", "length", "error", "timeout", "shutdown", "cancelled"]
"""The first three are ends of a generation; the others cut it off."""


class Constraint(Protocol):
    """The state of a grammar after the tokens so far."""

    def forbid(self, logits: FloatArray) -> FloatArray:
        """Return the logits, float ``[vocab]``, with minus infinity for every token that the grammar does not allow."""
        ...

    def accept(self, token_id: int) -> bool:
        """Advance by an allowed token; return whether the text is complete and nothing may follow."""
        ...


@dataclass(frozen=True)
class SequenceRequest:
    """One sequence to generate.

    Attributes:
        prompt_ids: token ids of the prompt, at least one.
        max_new_tokens: most tokens to generate.
        sampling: sampling parameters.
        frequency_penalty: subtracted from the logit of a token for every time that it was generated.
        presence_penalty: subtracted once from the logit of every token that was generated.
        logit_bias: added to the logits of these tokens.
        stop: texts that end the sequence and are not part of it.
        top_logprobs: how many of the most probable tokens to report at each position; None for no log-probabilities.
        constraint: state of the grammar that the text must match; None for none. Not shared between sequences.
        timeout: seconds from submission until the sequence is cut off; None for no limit.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    constraint: Constraint | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, of the model itself: before penalties, bias, temperature and filters.

    Attributes:
        token_id: the token that was chosen.
        logprob: its log-probability in nats.
        top: the most probable tokens with theirs, most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class SequenceUsage:
    """Token counts of a sequence; ``cached_tokens`` of the prompt were not computed again."""

    prompt_tokens: int
    cached_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Delivery:
    """One token of a sequence, or its end without one.

    Attributes:
        text: the text that became final; empty while a character or a stop string may be incomplete.
        token: the token; None if the sequence was cut off.
        end: only on the last delivery.
        usage: only on the last delivery.
        error: what went wrong, if ``end`` is ``error``.
    """

    text: str = ""
    token: TokenLogprob | None = None
    end: EndReason | None = None
    usage: SequenceUsage | None = None
    error: CushionError | None = None
