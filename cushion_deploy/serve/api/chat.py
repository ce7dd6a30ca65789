"""``/v1/chat/completions``: the sequences of a conversation, and answers as messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from time import time
from typing import Any
from uuid import uuid4

from cushion_deploy.serve.api.answer import Answer, Choice
from cushion_deploy.serve.api.chat_models import ChatRequest, plain_message
from cushion_deploy.serve.api.parameters import require_model, sequences
from cushion_deploy.serve.api.token_text import TokenText
from cushion_deploy.serve.api.tools import ParsedCall, ToolParser, with_tools
from cushion_deploy.serve.constraints import Grammars
from cushion_deploy.serve.engine import Engine
from cushion_deploy.serve.request import Constraint, SequenceRequest, TokenLogprob

FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


def chat_sequences(
    engine: Engine, grammars: Grammars, body: ChatRequest, timeout: float | None
) -> list[SequenceRequest]:
    """Return the sequences that a request asks for, one for each choice.

    Raises:
        ApiError: something is not supported, or the conversation is too long.
        UsageError: the model has no chat template, or it rejects the messages; or a schema cannot be used.
    """
    require_model(engine, body.model)
    body.require_supported()
    template = engine.bundle.require_chat_template()
    messages, variables = with_tools(template, [plain_message(m) for m in body.messages], body.offered_tools)
    return sequences(
        engine,
        body,
        engine.bundle.encode_chat(messages, **variables),
        max_new_tokens=body.new_tokens,
        top_logprobs=body.wanted_logprobs,
        timeout=timeout,
        param="messages",
        constraints=_constraints(grammars, body),
    )


def _constraints(grammars: Grammars, body: ChatRequest) -> Sequence[Constraint]:
    if body.offered_tools:
        tools = {t.function.name: t.function.parameters or {"type": "object"} for t in body.offered_tools}
        parallel = body.parallel_tool_calls is not False
        return grammars.start(grammars.tools(tools, required=body.must_call, parallel=parallel), body.choices)
    form = body.forced_format
    if form is None:
        return ()
    schema = form.json_schema
    return grammars.start(grammars.json_schema(schema.schema_) if schema else grammars.json_object(), body.choices)


class ChatForm:
    """Writes answers to one request."""

    def __init__(self, engine: Engine, body: ChatRequest, tokens: TokenText) -> None:
        """Choose the id of the answer."""
        self._body, self._tokens = body, tokens
        self._id = {"id": f"chatcmpl-{uuid4().hex}"}
        self._head = {"created": int(time()), "model": engine.name}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return a finished answer."""
        return {
            **self._id,
            "object": "chat.completion",
            **self._head,
            "choices": [self._choice(i, choice) for i, choice in enumerate(answer.choices)],
            "usage": answer.usage(self._body.choices),
        }

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
        finish = FINISH[choice.end]
        if self._body.offered_tools:
            parser = ToolParser()
            text, calls = parser.push(choice.text)
            text += parser.flush()
            if calls:
                message.update(content=text or None, tool_calls=[_call(call) for call in calls])
                finish = _finish(choice.end, called=True)
        return {"index": index, "message": message, "logprobs": self._logprobs(choice.tokens), "finish_reason": finish}

    async def chunks(self, answer: Answer) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks of a stream."""
        held = [Choice() for _ in answer.choices]
        parsers = [ToolParser() if self._body.offered_tools else None for _ in held]
        for i in range(len(held)):
            yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None})
        async for i, delivery in answer.deliveries():
            held[i].add(delivery)
            if not delivery.text and delivery.end is None:
                continue
            parser, text, calls = parsers[i], held[i].text, list[ParsedCall]()
            first = 0
            if parser is not None:
                first = parser.calls
                text, calls = parser.push(text)
                text += parser.flush() if delivery.end is not None else ""
            tokens, held[i] = held[i].tokens, Choice()
            if text or (tokens and self._body.logprobs):
                yield self._chunk(i, {"content": text}, tokens)
            for at, call in enumerate(calls, first):
                yield self._chunk(i, {"tool_calls": [{"index": at, **_call(call)}]})
            if delivery.end is not None:
                yield self._chunk(i, {}, end=_finish(delivery.end, called=parser is not None and parser.calls > 0))
        if self._body.include_usage:
            usage = answer.usage(self._body.choices)
            yield {**self._id, "object": "chat.completion.chunk", **self._head, "choices": [], "usage": usage}

    def _chunk(
        self, index: int, delta: dict[str, Any], tokens: Sequence[TokenLogprob] = (), end: str | None = None
    ) -> dict[str, Any]:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": self._logprobs(tokens) if tokens else None,
            "finish_reason": end,
        }
        more = {"usage": None} if self._body.include_usage else {}
        return {**self._id, "object": "chat.completion.chunk", **self._head, "choices": [choice], **more}

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            {**self._one(t.token_id, t.logprob), "top_logprobs": [self._one(i, p) for i, p in t.top]} for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _one(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = list(self._tokens.bytes_of(token_id))
        return {"token": self._tokens.text_of(token_id), "logprob": logprob, "bytes": raw}


def _finish(end: str, *, called: bool) -> str:
    reason = FINISH[end]
    return "tool_calls" if called and reason == "stop" else reason


def _call(call: ParsedCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}
