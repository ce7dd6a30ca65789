"""``/v1/completions``."""

from __future__ import annotations

from collections.abc import AsyncIterator
from time import time
from typing import Annotated, Any
from uuid import uuid4

from pydantic import Field

from cushion_deploy.serve.api.answer import Answer, Choice
from cushion_deploy.serve.api.errors import ApiError, unsupported
from cushion_deploy.serve.api.parameters import GenerationParameters, as_literal, require_model, sequences
from cushion_deploy.serve.api.token_text import TextOffsets, TokenText
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.request import SequenceRequest, TokenLogprob

DEFAULT_TOKENS = 16
MOST_PROMPTS = 64
FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


class CompletionRequest(GenerationParameters):
    """The body; a prompt is a text or its token ids, and there may be several."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[i for i in self.prompt if isinstance(i, int)]]
        return [p for p in self.prompt if isinstance(p, (str, list))]


def completion_sequences(engine: Engine, body: CompletionRequest, timeout: float | None) -> list[SequenceRequest]:
    """Return the sequences that a request asks for, the choices of each prompt in succession.

    Raises:
        ApiError: something is not supported, a token is unknown, or a prompt is empty or too long.
    """
    require_model(engine, body.model)
    as_literal(body.echo, False, "echo")
    if body.suffix is not None:
        raise unsupported("suffix", "'suffix' is not supported: the model continues text, it does not fill it in")
    if body.best_of is not None and body.best_of != body.choices:
        raise unsupported("best_of", "'best_of' is not supported, other than the number of choices 'n'")
    prompts = body.prompts()
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ApiError(400, f"{len(prompts)} prompts were given, expected 1 to {MOST_PROMPTS}", param="prompt")
    found = []
    for prompt in prompts:
        ids = engine.bundle.encode_prompt(prompt) if isinstance(prompt, str) else prompt
        if any(not 0 <= i < engine.vocab_size for i in ids):
            raise ApiError(400, f"a token id is outside the vocabulary of {engine.vocab_size}", param="prompt")
        limit = body.max_tokens or DEFAULT_TOKENS
        if body.max_tokens is None:
            limit = min(limit, max(engine.context_limit - len(ids), 1))
        found += sequences(
            engine, body, ids, max_new_tokens=limit, top_logprobs=body.logprobs, timeout=timeout, param="prompt"
        )
    return found


class CompletionForm:
    """Writes answers to one request."""

    def __init__(self, engine: Engine, body: CompletionRequest, tokens: TokenText) -> None:
        """Choose the id of the answer."""
        self._body, self._tokens = body, tokens
        self._head = {
            "id": f"cmpl-{uuid4().hex}",
            "object": "text_completion",
            "created": int(time()),
            "model": engine.name,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return a finished answer."""
        choices = [self._choice(i, c, TextOffsets(self._tokens)) for i, c in enumerate(answer.choices)]
        return {**self._head, "choices": choices, "usage": answer.usage(self._body.choices)}

    async def chunks(self, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        more = {"usage": None} if self._body.include_usage else {}
        held = [Choice() for _ in answer.choices]
        offsets = [TextOffsets(self._tokens) for _ in held]
        async for i, delivery in answer.deliveries():
            held[i].add(delivery)
            if not delivery.text and delivery.end is None:
                continue
            yield {**self._head, "choices": [self._choice(i, held[i], offsets[i])], **more}
            held[i] = Choice()
        if self._body.include_usage:
            yield {**self._head, "choices": [], "usage": answer.usage(self._body.choices)}

    def _choice(self, index: int, choice: Choice, offsets: TextOffsets) -> dict[str, Any]:
        wanted = self._body.logprobs is not None
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs(choice.tokens, offsets) if wanted else None,
            "finish_reason": FINISH.get(choice.end),
        }

    def _logprobs(self, tokens: list[TokenLogprob], offsets: TextOffsets) -> dict[str, Any]:
        return {
            "tokens": [self._tokens.text_of(t.token_id) for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [{self._tokens.text_of(i): p for i, p in t.top} for t in tokens],
            "text_offset": [offsets.next(t.token_id) for t in tokens],
        }
