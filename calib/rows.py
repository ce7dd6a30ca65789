"""Rows of a data set: plain text, or a conversation, which the chat template of a model turns into text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cushion_deploy.errors import UsageError

FIELDS = ("text", "messages", "conversations")
"""Fields that a row may have its document in; the first one that it has counts."""
EXPECTED = "a field 'text' (plain text), 'messages' (objects with role and content) or 'conversations' (from and value)"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
}
"""Roles of ShareGPT data sets, as chat templates name them."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
        where: file and row, for errors.
        messages: ``role``, ``content`` and whatever else the template reads.
        tools: the functions that the row offers; None for none.
    """

    where: str = field(compare=False)
    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dict, which identifies the conversation."""
        return {"messages": list(self.messages), "tools": self.tools and list(self.tools)}


Document = str | Chat


def document_of(row: object, where: str) -> Document:
    """Return the document of a row.

    Args:
        row: as JSON or a data set gives it.
        where: file and row, for errors.

    Raises:
        UsageError: it is not an object, has none of :data:`FIELDS`, the field is of another kind, or a message holds a
            value that JSON cannot, such as a date of a table; nothing is turned into text by guessing.
    """
    if not isinstance(row, Mapping):
        raise _expected(where, f"found {kind_of(row)}", "an object")
    for name in FIELDS:
        # A table has every column in every row: one that is null elsewhere holds the document.
        if name in row and (row[name] is not None or not any(row.get(other) is not None for other in FIELDS)):
            if name == "text":
                return _text(row[name], where, "'text'")
            return Chat(where, _messages(row, name, where), _tools(row.get("tools"), where))
    names = ", ".join(f"'{name}'" for name in sorted(map(str, row))) or "none"
    raise _expected(where, f"the fields are {names}"[:300], EXPECTED)


def kind_of(value: object) -> str:
    """Return what a value of JSON is: ``a list``, ``the number 5``."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return f"the number {value!s:.40}"
    for kind, name in ((str, "text"), (bytes, "bytes"), (Mapping, "an object"), ((list, tuple), "a list")):
        if isinstance(value, kind):
            return name
    return repr(value)[:40]


def _expected(where: str, found: str, expected: str) -> UsageError:
    return UsageError(f"{where}: {found}, expected {expected}", hint=f"give each row {EXPECTED}, or remove the row")


def _text(value: object, where: str, what: str) -> str:
    if not isinstance(value, str):
        raise _expected(where, f"{what} is {kind_of(value)}", "text")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        # JSON can name half of a surrogate pair.
        raise _expected(where, f"{what} has half a character, U+{ord(value[e.start]):04X}", "text") from e
    return value


def _messages(row: Mapping[Any, Any], name: str, where: str) -> tuple[Mapping[str, Any], ...]:
    found = row[name]
    if not isinstance(found, (list, tuple)):
        raise _expected(where, f"'{name}' is {kind_of(found)}", "a list of messages")
    if not found:
        raise _expected(where, f"'{name}' is empty", "at least one message")
    messages = tuple(_message(each, where, f"message {number}") for number, each in enumerate(found, 1))
    # ShareGPT data sets also have the system message beside the conversation.
    if name == "conversations" and row.get("system") is not None:
        return {"role": "system", "content": _text(row["system"], where, "'system'")}, *messages
    return messages


def _message(message: object, where: str, what: str) -> Mapping[str, Any]:
    if not isinstance(message, Mapping):
        raise _expected(where, f"{what} is {kind_of(message)}", "an object")
    if "from" in message and "role" not in message:
        speaker = _text(message["from"], where, f"'from' of {what}")
        if speaker not in _ROLES:
            raise _expected(where, f"{what} is from '{speaker[:40]}'", f"one of {', '.join(_ROLES)}")
        return {"role": _ROLES[speaker], "content": _text(message.get("value"), where, f"'value' of {what}")}
    _text(message.get("role"), where, f"'role' of {what}")
    # A table has every key in every message, null where it is absent; templates ask whether a key is there.
    kept = {str(key): value for key, value in message.items() if value is not None or key == "content"}
    _require_json(kept, where, what)
    return kept


def _tools(tools: object, where: str) -> tuple[Mapping[str, Any], ...] | None:
    if tools is None or tools == []:
        return None
    if not isinstance(tools, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _expected(where, f"'tools' is {kind_of(tools)}", "a list of objects, or nothing")
    _require_json(tools, where, "'tools'")
    return tuple(tools)


def _require_json(whole: object, where: str, what: str) -> None:
    """Check that a value holds nothing but what JSON can: templates write it, and digests are computed of it."""
    pending = [(whole, what)]
    while pending:
        value, name = pending.pop()
        if isinstance(value, str):
            _text(value, where, name)
        elif isinstance(value, Mapping):
            pending += [(key, f"a key of {what}") for key in value]
            pending += [(each, f"'{key!s:.40}' of {what}") for key, each in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(each, name) for each in value]
        elif not (
            value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value))
        ):
            raise _expected(where, f"{name} is {kind_of(value)}", "a value of JSON")
