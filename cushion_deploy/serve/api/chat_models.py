"""The body of ``/v1/chat/completions``."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cushion_deploy.serve.api.errors import ApiError, unsupported
from cushion_deploy.serve.api.parameters import ApiModel, GenerationParameters, as_literal


class FunctionCall(ApiModel):
    """The name of a function, and its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(ApiModel):
    """A call that the assistant made in an earlier turn."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(ApiModel):
    """A message; ``content`` is a text, null, or a list of parts, of which only those of text are supported."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(ApiModel):
    """A function that the model may call; ``parameters`` is a JSON schema."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(ApiModel):
    """A tool, of which the API knows other kinds too."""

    type: Literal["function"]
    function: Function


class NamedFunction(ApiModel):
    """The name of a function."""

    name: str


class NamedTool(ApiModel):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(ApiModel):
    """The schema of an answer; it is always enforced, whether ``strict`` or not."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = Field(default_factory=dict)
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_belongs_to_its_type(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' is given with the type 'json_schema', and only then")
        return self


class ChatRequest(GenerationParameters):
    """The body. ``max_tokens`` is the old name of ``max_completion_tokens``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None

    @model_validator(mode="after")
    def _only_with(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("'top_logprobs' is only for 'logprobs': true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("'max_tokens' and 'max_completion_tokens' differ; give one of them")
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("'tool_choice' is only for requests with 'tools'")
        if not self.tools and self.parallel_tool_calls is not None:
            raise ValueError("'parallel_tool_calls' is only for requests with 'tools'")
        return self

    def require_supported(self) -> None:
        """Check what the API has and this server has not; raises ApiError (400)."""
        as_literal(self.store, False, "store")
        as_literal(self.modalities, ["text"], "modalities")
        if self.service_tier not in (None, "auto", "default"):
            raise unsupported("service_tier", "'service_tier' is not supported, other than 'auto' and 'default'")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ApiError(400, "two tools have the same name", param="tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            name = self.tool_choice.function.name
            raise ApiError(400, f"'tool_choice' names '{name}', which is not in 'tools'", param="tool_choice")
        if self.forced_format and self.tools and self.tool_choice != "none":
            raise unsupported("response_format", "'response_format' and 'tools' together are not supported")

    @property
    def new_tokens(self) -> int | None:
        """Most tokens to generate; None for as many as fit."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the most probable tokens to report; None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def forced_format(self) -> ResponseFormat | None:
        """The form that the answer must have; None for any text."""
        return self.response_format if self.response_format and self.response_format.type != "text" else None

    @property
    def offered_tools(self) -> list[Tool]:
        """The tools that the model may call in this answer."""
        if self.tool_choice == "none":
            return []
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == name]
        return self.tools or []

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)


def plain_message(message: Message) -> dict[str, Any]:
    """Return a message for a chat template: without empty fields, arguments of calls as objects.

    Raises:
        ApiError: the arguments of a call are no JSON object.
    """
    plain = message.model_dump(exclude_none=True, exclude={"tool_calls"})
    plain["content"] = message.content
    if message.role == "developer":  # the newer name of the same role; templates know the older one
        plain["role"] = "system"
    if message.tool_calls:
        plain["tool_calls"] = [_plain_call(call) for call in message.tool_calls]
    return plain


def _plain_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ApiError(400, f"the arguments of the call '{call.id}' are no JSON object", param="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
