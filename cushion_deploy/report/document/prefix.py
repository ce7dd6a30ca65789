"""How the prefix was found and tuned."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from cushion_deploy.report.document.base import Count, Seconds, StrictModel, require_one_string_per_id

# "screen" is how reports named "self-sink" while it was the only screen.
CandidateSource = Literal["self-sink", "gradient", "obvious", "random", "seed", "scan", "screen"]


def _refuse_unknown_sources(value: str) -> str:
    known = get_args(CandidateSource)
    for source in value.split(" + "):
        if source not in known:
            raise ValueError(f"unknown candidate source {source!r}; known sources: {', '.join(known)}")
    return value


CandidateSources = Annotated[str, AfterValidator(_refuse_unknown_sources)]
"""All sources that proposed a token, such as ``self-sink + gradient``."""


class Candidate(StrictModel):
    """A token that was scored exactly in one step of the search."""

    token_id: Count
    token: str
    source: CandidateSources
    objective: float


class SearchStep(StrictModel):
    """One step of the greedy search: the best token, and whether its gain justified a prefix position.

    Attributes:
        proposed: number of tokens that each source proposed; a token proposed by several sources counts for each.
        finalists: number of those that were scored exactly. Both are empty in reports that did not record them.
        screened: number of tokens that the self-sink screen ran; 0 if none, or if it was not recorded.
    """

    token_id: Count
    token: str
    source: CandidateSources
    objective_before: float
    objective_after: float
    ratio: float
    accepted: bool
    top: tuple[Candidate, ...] = ()
    proposed: dict[CandidateSource, Count] = Field(default_factory=dict)
    finalists: dict[CandidateSource, Count] = Field(default_factory=dict)
    screened: Count = 0


class Rank(StrictModel):
    """Rank among ``of`` randomly sampled tokens of the vocabulary; 1 is the best."""

    rank: Annotated[int, Field(ge=1)]
    of: Count


class SinkState(StrictModel):
    """What a prefix does to text; null if it was not finite.

    Attributes:
        later: divergence of the unquantized model behind the prefix from the original one, from position 16 on.
        error: the objective of the search.
    """

    later: float | None
    error: float | None


class Averaging(StrictModel):
    """The token that was found, and the mean over many first tokens, at the first position of the prefix.

    Attributes:
        tokens: number of tokens in the mean.
        chats: how many of them are the beginning-of-sequence token, with which every chat begins.
        slack: the largest objective of the mean, in multiples of that of the token.
        kept: whether the prefix has the mean.
    """

    tokens: Count
    chats: Count
    found: SinkState
    averaged: SinkState
    slack: float
    kept: bool


class Search(StrictModel):
    """The prefix search; ``token_ids`` is empty if no attention sink justified a prefix.

    ``bits`` are those of the codes whose error was minimized. ``averaging`` is null if the first position was not to be
    averaged.
    """

    mode: str
    objective: str
    bits: Count = 8
    seed_tokens: tuple[int | str, ...] = ()
    token_ids: tuple[Count, ...]
    tokens: tuple[str, ...]
    positions_scored: Count
    positions_full_scan: Count
    candidates_scored: Count
    rank_in_random_sample: tuple[Rank, ...] = ()
    seconds: Seconds
    stopped: str
    steps: tuple[SearchStep, ...] = ()
    averaging: Averaging | None = None

    @property
    def averaged(self) -> bool:
        """Whether the first position of the prefix is a mean, and not that of its token."""
        return self.averaging is not None and self.averaging.kept

    @model_validator(mode="after")
    def _one_string_per_id(self) -> Search:
        require_one_string_per_id(self.token_ids, self.tokens)
        return self


class TuningState(StrictModel):
    """The model after a number of tuning steps, on held-out text, and the two parts of the last step's loss.

    Attributes:
        step: number of steps.
        held_out: what the kept state has least of.
        prediction, error: L_pred and L_q of the last step; L_q here and below relative to the untuned prefix.
        whole, later: mean divergence (cross-entropy for the loss ``ce``) in nats per token: at all positions, and from
            position 16 on. Null in reports that did not record it.
        held_out_error: L_q. Null in reports that did not record it.
    """

    step: Count
    held_out: float | None
    prediction: float | None = None
    error: float | None = None
    whole: float | None = None
    later: float | None = None
    held_out_error: float | None = None


class Tuning(StrictModel):
    """Tuning of the prefix; the state with the least ``held_out`` was kept, step 0 being the untuned prefix.

    ``skipped`` counts steps that changed nothing because a gradient was not finite.
    """

    loss: str
    scales_tuned: bool
    steps: Count
    seconds: Seconds
    kept_step: Count
    skipped: Count = 0
    states: tuple[TuningState, ...]

    @property
    def invisible(self) -> bool:
        """Whether the model was not quantized while it was tuned: the prefix was to change nothing but outliers."""
        return self.loss == "invisible"


class ChoiceCandidate(StrictModel):
    """One of the models that were compared, each as it would ship, on held-out text.

    Attributes:
        answer, answer_stderr: divergence on the original model's answers in chats; None if there are no chats.
    """

    name: str
    perplexity: float | None
    divergence: float | None
    kl_after_16: float | None
    kl_after_16_stderr: float | None
    answer: float | None = None
    answer_stderr: float | None = None


class Choice(StrictModel):
    """Whether the model ships with the prefix: the name of the candidate that was closer to the original model.

    Attributes:
        reason: ``divergence`` or ``perplexity``, whichever decided; ``only`` if there was no prefix to compare.
        tokens: number of predictions of the text that were compared.
        answer_tokens: number of predictions of answers in chats that were compared as well.
    """

    shipped: str
    reason: Literal["divergence", "perplexity", "only"]
    tokens: Count = 0
    answer_tokens: Count = 0
    candidates: tuple[ChoiceCandidate, ...] = ()
