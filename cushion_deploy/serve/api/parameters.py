"""The parameters that completions and chats share, and the sequences that they ask for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cushion_deploy.runtime.sampling import SamplingParams
from cushion_deploy.serve.api.errors import ApiError
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.request import Constraint, SequenceRequest

MOST_CHOICES = 16
MOST_STOPS = 16


class ApiModel(BaseModel):
    """A JSON object of the API. A field that is not listed is an error, so that nothing is ignored in silence."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(ApiModel):
    """``include_usage``: one more chunk at the end of a stream, with the usage and without choices."""

    include_usage: bool = False


class GenerationParameters(ApiModel):
    """Fields with the names, defaults and ranges of the OpenAI API, and three of other servers at the end.

    Attributes:
        seed: the same seed gives the same tokens, as long as the rest of the batch does not change the rounding.
        user, safety_identifier, prompt_cache_key: accepted, and used for nothing.
        top_k, min_p, repetition_penalty: as in ``cushion-deploy generate``.
    """

    model: str
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain_values(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            # JSON can write it, but it is no text: nothing can be made of it, not even an error that quotes it.
            raise ValueError("a text holds half of a surrogate pair, which is no character") from None
        # JSON does not tell 1.0 from 1, and an int field takes only the latter.
        whole = {k: int(v) for k, v in data.items() if k in _INTEGERS and isinstance(v, float) and v.is_integer()}
        return {**data, **whole}

    @model_validator(mode="after")
    def _consistent(self) -> GenerationParameters:
        stops = self.stops
        if len(stops) > MOST_STOPS or "" in stops:
            raise ValueError(f"'stop' takes up to {MOST_STOPS} texts, none of them empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' is only for streams; set 'stream' to true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end a sequence."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Sequences per prompt."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


_INTEGERS = {"max_tokens", "max_completion_tokens", "n", "seed", "top_k", "top_logprobs", "logprobs"}


def require_model(engine: Engine, name: str) -> None:
    """Check the name of the model; raises ApiError (404) if it is another one."""
    if name != engine.name:
        raise ApiError(
            404, f"the model '{name}' does not exist; this server has '{engine.name}'", param="model",
            code="model_not_found",
        )  # fmt: skip


def sequences(
    engine: Engine,
    p: GenerationParameters,
    prompt_ids: Sequence[int],
    *,
    max_new_tokens: int | None,
    top_logprobs: int | None,
    timeout: float | None,
    param: str,
    constraints: Sequence[Constraint] = (),
) -> list[SequenceRequest]:
    """Return the sequences of one prompt, one for each choice.

    Args:
        engine: the engine, for its limits.
        p: parameters of the request.
        prompt_ids: the prompt.
        max_new_tokens: most tokens; None for as many as the model has positions for.
        top_logprobs: see :class:`~cushion_deploy.serve.request.SequenceRequest`.
        timeout: seconds until a sequence is cut off.
        param: field of the request that holds the prompt, for errors.
        constraints: one for each choice, or none.

    Raises:
        ApiError: the prompt is empty or too long, or a biased token is outside the vocabulary.
    """
    free = engine.context_limit - len(prompt_ids)
    if not prompt_ids:
        raise ApiError(400, "the prompt has no token; give a prompt that is not empty", param=param)
    if free < (max_new_tokens or 1):
        raise ApiError(
            400,
            f"this model has {engine.context_limit} positions; the prompt takes {len(prompt_ids)} of them and "
            f"{max_new_tokens or 1} tokens are asked for. Shorten the prompt or ask for fewer tokens.",
            param=param,
            code="context_length_exceeded",
        )
    return [
        SequenceRequest(
            prompt_ids=tuple(prompt_ids),
            max_new_tokens=max_new_tokens or free,
            sampling=_sampling(p, choice),
            frequency_penalty=p.frequency_penalty or 0.0,
            presence_penalty=p.presence_penalty or 0.0,
            logit_bias=_bias(p, engine.vocab_size),
            stop=p.stops,
            top_logprobs=top_logprobs,
            constraint=constraints[choice] if constraints else None,
            timeout=timeout,
        )
        for choice in range(p.choices)
    ]


def _sampling(p: GenerationParameters, choice: int) -> SamplingParams:
    return SamplingParams(
        temperature=1.0 if p.temperature is None else p.temperature,
        top_k=p.top_k or 0,
        top_p=1.0 if p.top_p is None else p.top_p,
        min_p=p.min_p or 0.0,
        repetition_penalty=p.repetition_penalty or 1.0,
        seed=None if p.seed is None else _seed(p.seed, choice),
    )


def _seed(seed: int, choice: int) -> int:
    """Return the seed of a choice: the first has the given one, as in ``generate``, the others derived ones."""
    seed %= 1 << 64
    return seed if choice == 0 else int(np.random.SeedSequence([seed, choice]).generate_state(1, np.uint64)[0])


def _bias(p: GenerationParameters, vocab_size: int) -> dict[int, float]:
    found = {}
    for key, value in (p.logit_bias or {}).items():
        if not key.isdecimal() or int(key) >= vocab_size:
            message = f"logit_bias has the key {key!r}, expected a token id below {vocab_size}"
            raise ApiError(400, message, param="logit_bias")
        found[int(key)] = value
    return found


def as_literal(value: object, allowed: object, param: str) -> None:
    """Check a field that exists only so that its one supported value is accepted; raises ApiError otherwise."""
    if value is not None and value != allowed:
        raise ApiError(
            400, f"'{param}' is not supported, other than {allowed!r}", param=param, code="unsupported_parameter"
        )


FinishReason = Literal["stop", "length", "tool_calls"]
"""How an answer says that it ended."""
