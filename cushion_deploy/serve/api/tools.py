"""Calls of tools: how a prompt offers them, and how they are found in an answer.

A call is ``<tool_call>``, a JSON object with ``name`` and ``arguments``, and ``</tool_call>``, as the templates of many
models have it. A template that knows tools in this form gets them; for any other, a system message describes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cushion_deploy.runtime.chat import ChatTemplate, plain_message
from cushion_deploy.runtime.generate import StopStrings
from cushion_deploy.serve.api.chat_models import Tool
from cushion_deploy.serve.constraints import TOOL_BEGIN, TOOL_END

Messages = list[dict[str, Any]]
_INSTRUCTION = (
    "You may call these functions:\n{tools}\nTo call one, answer with its name and arguments in this form:\n"
    + TOOL_BEGIN
    + '\n{{"name": "...", "arguments": {{...}}}}\n'
    + TOOL_END
)


@dataclass(frozen=True)
class ParsedCall:
    """A call that the model made; ``arguments`` is the JSON text of an object."""

    name: str
    arguments: str


def knows_tools(template: ChatTemplate) -> bool:
    """Return whether a chat template offers tools, and calls them in this form."""
    return "tools" in template.source and TOOL_BEGIN in template.source


def with_tools(template: ChatTemplate, messages: Messages, tools: Sequence[Tool]) -> tuple[Messages, dict[str, Any]]:
    """Return the messages and the further variables for a chat template that is to offer tools.

    Raises:
        UsageError: tools are described in a message, and a content is neither text, null nor a list of text parts.
    """
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    if knows_tools(template):
        return messages, {"tools": described} if described else {}
    plain = [_without_tools(plain_message(message, number)) for number, message in enumerate(messages, 1)]
    if not described:
        return plain, {}
    text = _INSTRUCTION.format(tools="\n".join(json.dumps(tool["function"]) for tool in described))
    if plain[0]["role"] == "system":
        first = {**plain[0], "content": f"{plain[0]['content']}\n\n{text}"}
        return [first, *plain[1:]], {}
    return [{"role": "system", "content": text}, *plain], {}


def _without_tools(message: Mapping[str, Any]) -> dict[str, Any]:
    """Write calls and results as text, for templates that know neither."""
    plain = {key: value for key, value in message.items() if key not in ("tool_calls", "tool_call_id")}
    if message["role"] == "tool":
        return {**plain, "role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if "tool_calls" in message:
        calls = (json.dumps(call["function"]) for call in message["tool_calls"])
        written = "\n".join(f"{TOOL_BEGIN}\n{call}\n{TOOL_END}" for call in calls)
        return {**plain, "content": "\n".join(filter(None, [message["content"], written]))}
    return plain


class ToolParser:
    """Separates the text of an answer from the calls in it, while it is streamed."""

    def __init__(self) -> None:
        """Start at the beginning of an answer."""
        self._opening = StopStrings([TOOL_BEGIN])
        self._call: str | None = None
        self._searched = 0
        self._newlines, self._behind_call = "", False
        self.calls = 0

    def push(self, piece: str) -> tuple[str, list[ParsedCall]]:
        """Return the text and the calls that became certain."""
        content, found = "", []
        while piece:
            if self._call is None:
                text, opened = self._opening.push(piece)
                content += self._inner(text)
                if not opened:
                    break
                # What follows the tag: all but what was held back, the text before the tag, and the tag.
                piece = self._rest(TOOL_BEGIN)
                self._call, self._newlines = "", ""
            self._call += piece
            ended = self._ended(self._call)
            if ended is None:
                break
            call, piece = ended
            self._call, self._searched, self._behind_call = None, 0, True
            found.append(call)
        self.calls += len(found)
        return content, found

    def flush(self) -> str:
        """Return the text that was held back, at the end of an answer; a call that was cut off is dropped."""
        if self._call is not None:
            return ""
        text = self._inner(self._opening.flush()) + self._newlines
        self._newlines = ""
        return text

    def _inner(self, text: str) -> str:
        """Return text without newlines that follow a call, and hold back those at its end, which may precede one."""
        if self._behind_call:
            text = text.lstrip("\n")
            self._behind_call = not text
        text = self._newlines + text
        certain = text.rstrip("\n")
        self._newlines = text[len(certain) :]
        return certain

    def _ended(self, text: str) -> tuple[ParsedCall, str] | None:
        """Return the call and what follows its end tag, if that is here; a string in the call may contain the tag."""
        while (at := text.find(TOOL_END, self._searched)) >= 0:
            call = _parsed(text[:at])
            if call is not None:
                return call, text[at + len(TOOL_END) :]
            self._searched = at + 1
        return None

    def _rest(self, tag: str) -> str:
        _, _, rest = self._opening.flush().partition(tag)
        return rest


def _parsed(body: str) -> ParsedCall | None:
    try:
        call = json.loads(body)
    except ValueError:
        return None
    # The grammar makes this an object with both keys.
    return ParsedCall(str(call["name"]), json.dumps(call["arguments"], ensure_ascii=False))
