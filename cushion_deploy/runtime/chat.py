"""Render messages with the chat template of the model, as transformers does, and tokenize prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer

from cushion_deploy.errors import MissingDependency, UsageError

Message = Mapping[str, Any]
"""``role`` and ``content``, and any other key that the template reads."""


_PROBE = "content-as-text"
_MESSAGE = 'give {"role": "user", "content": "..."}'
_CONTENT = 'give the content as text, null, or a list of {"type": "text", "text": "..."}'


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template in Jinja2, rendered in a sandbox because it comes with the model and is not trusted.

    Attributes:
        source: text of the template.
        special_tokens: name (``bos_token``, ``eos_token``, ...) to text, available to the template.
    """

    source: str
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the prompt.

        Args:
            messages: the conversation so far.
            add_generation_prompt: end with the header of the assistant's turn.
            variables: further variables of the template, such as ``tools``.

        The content of a message is text, null, or a list of text parts. It is rendered as in transformers, in the form
        in which it was given, unless the template would write Python's ``None`` or list: then null is no text, and the
        texts of parts are joined. A template that reads parts alone, as of models that read images, gets parts.

        Raises:
            UsageError: there is no message, a content is of another kind, or the template is invalid, recurses without
                end or rejects the messages.
            MissingDependency: jinja2 is not installed.
        """
        if not messages:
            raise UsageError("the conversation has no message", hint='give at least {"role": "user", "content": ...}')
        try:
            import jinja2
        except ImportError as e:
            raise MissingDependency("chat templates need jinja2", hint="pip install 'cushion-deploy[chat]'") from e
        plain = [plain_message(message, number) for number, message in enumerate(messages, 1)]
        names = {"add_generation_prompt": add_generation_prompt, **variables}
        try:
            if self._reads_parts:
                return self._render([_in_parts(message) for message in plain], names)
            if plain == [dict(message) for message in messages]:
                return self._render(plain, names)
            return self._render_as_given(messages, plain, names)
        except RecursionError as e:
            raise UsageError(
                "the chat template calls itself without end, or is nested too deeply",
                hint="replace chat_template.jinja of the model by one that ends, and build the bundle again",
            ) from e
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as e:
            raise UsageError(
                f"the chat template rejects these messages: {e}",
                hint="each message is an object with `role` and `content`, in the order that the model was trained on",
            ) from e

    def _render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        names = {**self.special_tokens, "tools": None, "documents": None, **variables}
        return str(_environment().from_string(self.source).render(messages=messages, **names))

    def _render_as_given(
        self, messages: Sequence[Message], plain: Sequence[Message], variables: Mapping[str, Any]
    ) -> str:
        """Return the rendering of contents as they are, or of their texts if the template cannot read those."""
        import jinja2

        expected = self._render(plain, variables)
        try:
            found = self._render(messages, variables)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return expected
        lists = [str(m["content"]) for m in messages if isinstance(m.get("content"), (list, tuple))]
        written = any(found.count(text) > expected.count(text) for text in ("None", *lists))
        return expected if written else found

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template leaves out content that is text, and writes the same in parts."""
        import jinja2

        def writes(content: Any) -> bool:
            try:
                return _PROBE in self._render([{"role": "user", "content": content}], {})
            except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError):
                return False

        return not writes(_PROBE) and writes([{"type": "text", "text": _PROBE}])


def _in_parts(message: Message) -> dict[str, Any]:
    if "content" not in message:
        return dict(message)
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def plain_message(message: Message, number: int) -> dict[str, Any]:
    """Return a message with its content as text, which is what templates of text models expect.

    Args:
        message: a message; without ``content``, as some with tool calls are, it stays as it is.
        number: its place in the conversation, from 1, for errors.

    Raises:
        UsageError: it is not an object, or its content is neither text, null nor a list of text parts.
    """
    if not isinstance(message, Mapping):
        raise UsageError(f"message {number} is {_kind(message)}, expected an object", hint=_MESSAGE)
    if "content" not in message:
        return dict(message)
    return {**message, "content": _plain_content(message["content"], number)}


def _plain_content(content: Any, number: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, (list, tuple)):
        raise UsageError(f"the content of message {number} is {_kind(content)}", hint=_CONTENT)
    return "".join(_part_text(part, number) for part in content)


def _part_text(part: Any, number: int) -> str:
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        kind = repr(part.get("type"))[:40] if isinstance(part, Mapping) else _kind(part)
        raise UsageError(f"message {number} has a part of type {kind}, and this model reads text only", hint=_CONTENT)
    if not isinstance(part.get("text"), str):
        raise UsageError(f"message {number} has a text part without text", hint=_CONTENT)
    return str(part["text"])


def _kind(value: object) -> str:
    return type(value).__name__


def _environment() -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block that marks the assistant's text for training; rendered as its content."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # The filter of jinja2 escapes for HTML; models are trained on plain JSON.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def encode_chat(
    tokenizer: Tokenizer, rendered: str, bos_token_id: int | None = None, *, keep_bos: bool = True
) -> list[int]:
    """Return the token ids of a rendered chat template, which contains the special tokens itself.

    Where a template leaves out the beginning-of-sequence token that the tokenizer puts before every text, it is added,
    as llama.cpp does: many templates were written for training code that tokenizes the rendered text. (The method
    ``apply_chat_template`` of transformers does not add it.)

    Without ``keep_bos`` the beginning-of-sequence token is removed, because the prefix takes its place.
    """
    ids = list(tokenizer.encode(rendered, add_special_tokens=False).ids)
    if not keep_bos:
        return _without_bos(ids, bos_token_id)
    if bos_token_id is not None and ids[:1] != [bos_token_id] and _adds_bos(tokenizer, bos_token_id):
        return [bos_token_id, *ids]
    return ids


def _adds_bos(tokenizer: Tokenizer, bos_token_id: int) -> bool:
    return list(tokenizer.encode("").ids[:1]) == [bos_token_id]


def encode_prompt(tokenizer: Tokenizer, text: str, bos_token_id: int | None, *, keep_bos: bool = True) -> list[int]:
    """Return the token ids of plain text, with the special tokens that the tokenizer adds.

    If the text starts with a beginning-of-sequence token of its own, there is one in the result, not two. Without
    ``keep_bos`` there is none, because the prefix takes its place.
    """
    ids = _encode_once(tokenizer, text, bos_token_id)
    return ids if keep_bos else _without_bos(ids, bos_token_id)


def _without_bos(ids: list[int], bos_token_id: int | None) -> list[int]:
    return ids[1:] if bos_token_id is not None and ids[:1] == [bos_token_id] else ids


def _encode_once(tokenizer: Tokenizer, text: str, bos_token_id: int | None) -> list[int]:
    ids = list(tokenizer.encode(text).ids)
    if bos_token_id is not None and ids[:2] == [bos_token_id] * 2:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        # Only a token that the tokenizer added is removed: a text may contain it twice on purpose.
        return ids[1:] if len(plain) < len(ids) else ids
    return ids
