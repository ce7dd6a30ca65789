"""Requests in a JSON Lines file: each line a prompt or a conversation, checked before any work is done."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cushion_deploy.errors import UsageError
from cushion_deploy.runtime.chat import Message
from cushion_deploy.store.text_files import decode_utf8

_FORM = 'each line is {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}, with an "id" if you like'
RequestId = str | int


@dataclass(frozen=True)
class Request:
    """One line: a plain prompt or a conversation.

    Attributes:
        id: as given, or the number of the line.
        where: file and line, for errors.
        prompt: plain text, or None.
        messages: a conversation, or None.
    """

    id: RequestId
    where: str
    prompt: str | None = None
    messages: Sequence[Message] | None = None


def read_requests(file: Path) -> list[Request]:
    """Read all requests of a file; lines without a character are skipped.

    Raises:
        UsageError: the file cannot be read, is not UTF-8, has no request, or has a bad line; its number is named.
    """
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UsageError(f"cannot read {file}: {e.strerror}", hint="give a file with one JSON object a line") from e
    # Not splitlines, which also splits at U+2028 and other separators that JSON strings may contain.
    lines = decode_utf8(data, str(file)).split("\n")
    found = [_request(line, number, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UsageError(f"{file} has no request", hint=_FORM)
    seen: dict[RequestId, str] = {}
    for request in found:
        if request.id in seen:
            raise UsageError(
                f"{request.where}: the id {request.id!r} is also that of {seen[request.id]}",
                hint="give every line an id of its own, or none (it is then the number of the line)",
            )
        seen[request.id] = request.where
    return found


def _request(line: str, number: int, where: str) -> Request:
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is valid JSON and no text
    except (ValueError, RecursionError) as e:
        raise UsageError(f"{where}: not valid JSON ({str(e)[:100]})", hint=_FORM) from e
    if not isinstance(value, dict):
        raise UsageError(f"{where}: {type(value).__name__}, expected an object", hint=_FORM)
    if unknown := sorted(set(value) - {"prompt", "messages", "id"}):
        raise UsageError(f"{where}: unknown field {unknown[0]!r}", hint=_FORM)
    if ("prompt" in value) == ("messages" in value):
        raise UsageError(f"{where}: expected either a prompt or messages", hint=_FORM)
    name = value.get("id", number)
    if not isinstance(name, (str, int)) or isinstance(name, bool):
        raise UsageError(f"{where}: the id is {type(name).__name__}, expected text or a whole number", hint=_FORM)
    _check_content(value, where)
    return Request(name, where, value.get("prompt"), value.get("messages"))


def _check_content(value: dict[str, Any], where: str) -> None:
    if "prompt" in value and not isinstance(value["prompt"], str):
        raise UsageError(f"{where}: the prompt is {type(value['prompt']).__name__}, expected text", hint=_FORM)
    if "messages" in value and not isinstance(value["messages"], list):
        raise UsageError(f"{where}: messages is {type(value['messages']).__name__}, expected a list", hint=_FORM)
